//! A slow oracle: vLLM's own stride algorithm, written again in its general form (a permutation of
//! axes) rather than as the table that the crate uses, and logical tensors in plain arrays.

use pillion_layouts::vllm::groups::{Group, Pages};
use pillion_layouts::vllm::{KvCacheTensor, Packing};
use pillion_layouts::{BlockPlan, CheckedGroup, Dtype, Order, Refusal, Segment, Worker};
use proptest::prelude::*;

const L: usize = 0;
const B: usize = 1;

/// A cache to be described: sizes small enough to look at every byte.
#[derive(Debug, Clone)]
pub(crate) struct Geometry {
    pub(crate) order: Order,
    /// Layers of each tensor.
    pub(crate) tensors: Vec<u64>,
    pub(crate) blocks: u64,
    pub(crate) heads: u64,
    pub(crate) states: u64,
    pub(crate) content: u64,
    pub(crate) dtype: Dtype,
    /// Bytes between blocks that are nobody's.
    pub(crate) align: u64,
    /// Bytes of memory behind the tensors.
    pub(crate) tail: u64,
}

/// A description of one group whose tensors are alike.
#[derive(Debug, Clone)]
pub(crate) struct KvCache {
    pub(crate) order: String,
    pub(crate) num_blocks: u64,
    pub(crate) block_tokens: u32,
    pub(crate) packing: Packing,
    pub(crate) heads: u32,
    pub(crate) states: u32,
    pub(crate) content_bytes: u32,
    pub(crate) page_bytes: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) tensors: Vec<KvCacheTensor>,
}

/// Keys of one element, values of the rest.
pub(crate) fn key_value(total_heads: u32, content_bytes: u32, dtype: Dtype) -> Packing {
    let key_bytes = dtype.element_bytes();
    Packing::KeyValue { total_heads, key_bytes, value_bytes: content_bytes - key_bytes, dtype }
}

impl KvCache {
    /// What a shim registers of it.
    pub(crate) fn worker(&self) -> Worker {
        let pages = |tensor: &KvCacheTensor| Pages {
            tensor: tensor.clone(),
            heads: self.heads,
            states: self.states,
            content_bytes: self.content_bytes,
            page_bytes: self.page_bytes,
            kernel_blocks: 1,
            packing: self.packing.clone(),
        };
        Worker {
            order: self.order.clone(),
            num_blocks: self.num_blocks,
            memory_bytes: self.memory_bytes,
            rank: 0,
            world: 1,
            groups: vec![Group {
                block_tokens: self.block_tokens,
                pages: self.tensors.iter().map(pages).collect(),
            }],
        }
    }

    pub(crate) fn check(&self) -> Result<CheckedGroup, Refusal> {
        Ok(self.worker().check()?.remove(0))
    }
}

/// Logical axes, outermost first in memory, as the values of vLLM's `KVCacheLayout`.
fn stride_order(order: Order) -> [usize; 5] {
    match order {
        Order::Lbhnc => [0, 1, 2, 3, 4],
        Order::Lbnhc => [0, 1, 3, 2, 4],
        Order::Lhbnc => [0, 2, 1, 3, 4],
        Order::Blhnc => [1, 0, 2, 3, 4],
        Order::Blnhc => [1, 0, 3, 2, 4],
        Order::Bhlnc => [1, 2, 0, 3, 4],
    }
}

/// vLLM's `compute_layout_strides`, byte strides in `[L, B, H, N, C]`.
fn compute_layout_strides(order: Order, shape: [u64; 5], fixed: [Option<u64>; 5]) -> [u64; 5] {
    let mut strides = [0; 5];
    let mut current = 1;
    for axis in stride_order(order).into_iter().rev() {
        strides[axis] = fixed[axis].unwrap_or(current);
        current = strides[axis] * shape[axis];
    }
    strides
}

/// Where everything is, by vLLM's formulas.
pub(crate) struct Oracle {
    /// Per layer: address of block 0 and the strides `[L, B, H, N, C]`.
    layers: Vec<(u64, [u64; 5])>,
    pub(crate) cache: KvCache,
}

impl Geometry {
    pub(crate) fn page(&self) -> u64 {
        self.heads * self.states * self.content
    }

    pub(crate) fn layers(&self) -> u64 {
        self.tensors.iter().sum()
    }

    pub(crate) fn record_bytes(&self) -> u64 {
        self.page() * self.layers()
    }

    /// vLLM's `get_kv_cache_config_from_groups` and `create_kv_cache_views`.
    pub(crate) fn oracle(&self) -> Oracle {
        let (page, order) = (self.page(), self.order);
        let outermost = order.is_block_outermost();
        let compact = outermost || matches!(order, Order::Lbnhc | Order::Lbhnc);
        let align = match (outermost, compact) {
            (true, _) => self.align % page,
            (false, true) => self.align,
            (false, false) => 0,
        };
        let per_block = if outermost { page * self.layers() } else { page };
        let fixed = (outermost || align > 0).then_some(per_block + align);
        let mut oracle = Oracle { layers: Vec::new(), cache: self.cache() };
        let (mut offset, mut index) = (0, 0);
        for &count in &self.tensors {
            let shape = [count, self.blocks, self.heads, self.states, self.content];
            let declared = compute_layout_strides(order, shape, [None, fixed, None, None, None]);
            let seen = compute_layout_strides(
                order,
                shape,
                [Some(declared[L]), Some(declared[B]), None, None, None],
            );
            let names = (index..index + count).map(|layer| format!("layers.{layer}.attn")).collect();
            oracle.cache.tensors.push(KvCacheTensor {
                size: 0,
                offset,
                layer_stride: declared[L],
                block_stride: declared[B],
                layers: names,
            });
            oracle.layers.extend((0..count).map(|layer| (offset + layer * declared[L], seen)));
            index += count;
            offset += count * if outermost { page } else { declared[L] };
        }
        let size = if outermost { (per_block + align) * self.blocks } else { offset };
        oracle.cache.tensors.iter_mut().for_each(|tensor| tensor.size = size);
        oracle.cache.memory_bytes = size + self.tail;
        oracle
    }

    fn cache(&self) -> KvCache {
        KvCache {
            order: self.order.to_string(),
            num_blocks: self.blocks,
            block_tokens: self.states as u32,
            packing: key_value(self.heads as u32, self.content as u32, self.dtype),
            heads: self.heads as u32,
            states: self.states as u32,
            content_bytes: self.content as u32,
            page_bytes: self.page(),
            memory_bytes: 0,
            tensors: Vec::new(),
        }
    }

    /// Every cell of a block in record order: layer, head, state.
    pub(crate) fn cells(&self) -> impl Iterator<Item = (u64, u64, u64)> + use<> {
        let (layers, heads, states) = (self.layers(), self.heads, self.states);
        (0..layers).flat_map(move |l| (0..heads).flat_map(move |h| (0..states).map(move |n| (l, h, n))))
    }

    /// The address of every byte of a block, in record order.
    pub(crate) fn addresses(&self, oracle: &Oracle, block: u64) -> Vec<u64> {
        self.cells()
            .flat_map(|(l, h, n)| {
                let at = oracle.address(l, block, h, n);
                at..at + self.content
            })
            .collect()
    }
}

impl Oracle {
    pub(crate) fn address(&self, layer: u64, block: u64, head: u64, state: u64) -> u64 {
        let (start, strides) = self.layers[layer as usize];
        start + block * strides[1] + head * strides[2] + state * strides[3]
    }
}

pub(crate) fn any_order() -> impl Strategy<Value = Order> {
    proptest::sample::select(Order::ALL.to_vec())
}

pub(crate) fn any_geometry() -> impl Strategy<Value = Geometry> {
    let dtype = proptest::sample::select(vec![Dtype::Float32, Dtype::Bfloat16, Dtype::Fp8E4m3]);
    let sizes = (1..=4u64, 1..=4u64, 1..=5u64, 2..=4u64);
    let tensors = proptest::collection::vec(1..=3u64, 1..=3);
    let slack = (prop_oneof![Just(0), 1..=24u64], 0..=40u64);
    (any_order(), tensors, sizes, dtype, slack).prop_map(
        |(order, tensors, (blocks, heads, states, elements), dtype, (align, tail))| Geometry {
            order,
            tensors,
            blocks,
            heads,
            states,
            content: elements * u64::from(dtype.element_bytes()),
            dtype,
            align,
            tail,
        },
    )
}

/// Engine memory → record, as the sidecar will do it.
pub(crate) fn save(plan: &BlockPlan, memory: &[u8], block: u64) -> Vec<u8> {
    let mut record = vec![0; plan.record_bytes() as usize];
    for Segment { engine, record: to, len } in plan.segments(block) {
        let (engine, to, len) = (engine as usize, to as usize, len as usize);
        record[to..to + len].copy_from_slice(&memory[engine..engine + len]);
    }
    record
}

/// Record → engine memory.
pub(crate) fn load(plan: &BlockPlan, record: &[u8], memory: &mut [u8], block: u64) {
    for Segment { engine, record: from, len } in plan.segments(block) {
        let (engine, from, len) = (engine as usize, from as usize, len as usize);
        memory[engine..engine + len].copy_from_slice(&record[from..from + len]);
    }
}

/// Merges runs that touch on both sides.
pub(crate) fn merged(runs: impl IntoIterator<Item = Segment>) -> Vec<Segment> {
    let mut out: Vec<Segment> = Vec::new();
    for run in runs {
        match out.last_mut() {
            Some(last) if last.engine + last.len == run.engine && last.record + last.len == run.record => {
                last.len += run.len
            }
            _ => out.push(run),
        }
    }
    out
}
