//! Caches of every covered engine, each with a slow oracle of its own: where one logical element is,
//! written as index arithmetic over the engine's documented array, not as strides.

mod pools;

use pillion_layouts::blade_kvt::Shape;
use pillion_layouts::sglang::PoolOrder;
use pillion_layouts::tensorrt_llm::PageOrder;
use pillion_layouts::vllm::groups::{Group, Pages, Pool, shards};
use pillion_layouts::vllm::{KvCacheTensor, Packing, StatePart};
use pillion_layouts::{Attention, Dtype, Order, Part, Rank, Role, Shard};

/// One logical row of bytes: role, layer, head and state, all of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) role: Role,
    pub(crate) layer: u32,
    pub(crate) head: u32,
    pub(crate) state: u32,
}

/// Where a row of a block is in the memory of one rank.
type Oracle = Box<dyn Fn(u64, Row) -> u64>;

/// One rank's cache.
pub(crate) struct World {
    pub(crate) shard: Shard,
    pub(crate) bytes: u64,
    pub(crate) at: Oracle,
    /// What it holds.
    pub(crate) rows: Vec<(Row, u64)>,
}

/// A plane as the tests see it: role, heads, states, bytes, whether ranks hold all of it.
pub(crate) type TestPlane = (Role, u32, u32, u32, bool);

/// What a model's block holds.
#[derive(Debug, Clone)]
pub(crate) enum What {
    Kv { heads: u32, bytes: u32 },
    Scaled { heads: u32, bytes: u32 },
    Nvfp4 { heads: u32, data: u32, scale: u32 },
    OpaqueHeads { heads: u32, bytes: u32 },
    Latent { row: u32 },
    LatentIndex { row: u32, key: u32, scale: u32 },
    OpaquePage { row: u32 },
    State { rows: u32, parts: Vec<u32>, element: u32, heads: u32, bytes: u32, replicated: bool },
}

/// An engine and its options.
#[derive(Debug, Clone)]
pub(crate) enum Engine {
    Vllm { order: Order, align: u64, pad: u64, kernel: u32 },
    VllmPlanes { order: Order },
    TrtV1(PageOrder),
    TrtV2(PageOrder),
    Sglang(PoolOrder),
    Blade { shape: Shape, kernel: u32, pack: u32, pad: u64 },
    Record,
}

/// A cache as a test asks for it.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) what: What,
    pub(crate) tokens: u32,
    pub(crate) blocks: u64,
    /// Layers of this rank.
    pub(crate) layers: Vec<u32>,
    pub(crate) rank: Rank,
    pub(crate) channels_first: bool,
}

impl What {
    /// The planes of a block of `tokens` tokens.
    pub(crate) fn planes(&self, tokens: u32) -> Vec<TestPlane> {
        let n = tokens;
        match self {
            What::Kv { heads, bytes } => {
                vec![(Role::Key, *heads, n, *bytes, false), (Role::Value, *heads, n, *bytes, false)]
            }
            What::Scaled { heads, bytes } => vec![
                (Role::Key, *heads, n, *bytes, false),
                (Role::KeyScale, *heads, n, 4, false),
                (Role::Value, *heads, n, *bytes, false),
                (Role::ValueScale, *heads, n, 4, false),
            ],
            What::Nvfp4 { heads, data, scale } => vec![
                (Role::Key, *heads, n, *data, false),
                (Role::KeyScale, *heads, 1, n * scale, false),
                (Role::Value, *heads, n, *data, false),
                (Role::ValueScale, *heads, 1, n * scale, false),
            ],
            What::OpaqueHeads { heads, bytes } => vec![(Role::Opaque, *heads, 1, n * bytes, false)],
            What::Latent { row } => vec![(Role::Latent, 1, n, *row, true)],
            What::LatentIndex { row, key, scale } => vec![
                (Role::Latent, 1, n, *row, true),
                (Role::IndexKey, 1, n, *key, true),
                (Role::IndexScale, 1, n, *scale, true),
            ],
            What::OpaquePage { row } => vec![(Role::Opaque, 1, 1, n * row, true)],
            What::State { rows, parts, element, heads, bytes, replicated } => {
                let mut out: Vec<TestPlane> = Vec::new();
                for channels in parts {
                    out.push((Role::State(out.len() as u8), *channels, *rows, *element, *replicated));
                }
                out.push((Role::State(out.len() as u8), *heads, 1, *bytes, *replicated));
                out
            }
        }
    }

    /// Whether its heads divide between so many ranks.
    pub(crate) fn allows(&self, ranks: u32) -> bool {
        let channels = matches!(self, What::State { .. });
        self.planes(1).iter().all(|(_, heads, _, _, whole)| {
            *whole || heads % ranks == 0 || (!channels && ranks.is_multiple_of(*heads))
        })
    }
}

/// First head of a rank, and how many it holds.
fn held(heads: u32, whole: bool, rank: Rank) -> (u32, u32) {
    match whole {
        true => (0, heads),
        false => (heads * rank.index / rank.size, (heads / rank.size).max(1)),
    }
}

impl Setup {
    fn plane(&self, role: Role) -> TestPlane {
        *self.what.planes(self.tokens).iter().find(|plane| plane.0 == role).expect("a plane of that role")
    }

    fn local(&self, role: Role) -> (u32, u32) {
        let (_, heads, _, _, whole) = self.plane(role);
        held(heads, whole, self.rank)
    }

    fn rows(&self) -> Vec<(Row, u64)> {
        let mut rows = Vec::new();
        for (role, heads, states, bytes, whole) in self.what.planes(self.tokens) {
            let (first, count) = held(heads, whole, self.rank);
            for layer in &self.layers {
                for head in first..first + count {
                    let row = |state| (Row { role, layer: *layer, head, state }, u64::from(bytes));
                    rows.extend((0..states).map(row));
                }
            }
        }
        rows
    }

    fn attention(&self) -> Attention {
        match self.what {
            What::Kv { heads, bytes } => {
                Attention::KeyValue { total_heads: heads, head_bytes: bytes, dtype: Dtype::Fp8 }
            }
            What::Latent { row } => Attention::Latent { row_bytes: row, format: "fp8".into() },
            _ => panic!("not an attention"),
        }
    }

    /// (keys or values, layer's position, local head) of a row.
    fn indices(&self, row: Row) -> (u64, u64, u64) {
        let layer = self.layers.iter().position(|layer| *layer == row.layer).expect("a held layer");
        let side = u64::from(row.role == Role::Value);
        (side, layer as u64, u64::from(row.head - self.local(row.role).0))
    }

    /// The cache of this rank in an engine; `None` where the engine cannot hold such a thing.
    pub(crate) fn world(&self, engine: &Engine) -> Option<World> {
        let attention = matches!(self.what, What::Kv { .. } | What::Latent { .. });
        let (shard, bytes, at) = match engine {
            Engine::Vllm { order, align, pad, kernel } => self.vllm(*order, *align, *pad, *kernel)?,
            Engine::VllmPlanes { order } => self.vllm_planes(*order)?,
            Engine::Blade { pad, .. } if matches!(self.what, What::State { .. }) => self.blade_state(*pad),
            Engine::Record => self.record(),
            _ if !attention => return None,
            Engine::TrtV1(order) => self.trt_v1(*order),
            Engine::TrtV2(order) => self.trt_v2(*order),
            Engine::Sglang(order) => self.sglang(*order)?,
            Engine::Blade { shape, kernel, pack, pad } => self.blade(*shape, *kernel, *pack, *pad)?,
        };
        Some(World { shard, bytes, at, rows: self.rows() })
    }

    fn parts(&self) -> Vec<StatePart> {
        let What::State { rows, parts, element, heads, bytes, .. } = &self.what else { return Vec::new() };
        vec![
            StatePart::Channels {
                rows: *rows,
                parts: parts.clone(),
                element_bytes: *element,
                channels_first: self.channels_first,
                format: "conv".into(),
            },
            StatePart::Heads { total: *heads, bytes: *bytes, format: "ssm".into() },
        ]
    }

    fn page_of_first_layer(&self) -> u64 {
        self.rows().iter().filter(|(row, _)| row.layer == self.layers[0]).map(|row| row.1).sum()
    }

    /// Where a row of a state is in its page.
    fn in_state(&self, row: Row) -> u64 {
        let What::State { rows, parts, element, bytes, .. } = &self.what else { panic!("not a state") };
        let Role::State(number) = row.role else { panic!("not a state") };
        let width = |part: usize| u64::from(self.local(Role::State(part as u8)).1);
        let all: u64 = (0..parts.len()).map(width).sum();
        let before: u64 = (0..usize::from(number).min(parts.len())).map(width).sum();
        let local = u64::from(row.head - self.local(row.role).0);
        let (rows, element) = (u64::from(*rows), u64::from(*element));
        if usize::from(number) == parts.len() {
            return all * rows * element + local * u64::from(*bytes);
        }
        match self.channels_first {
            true => ((before + local) * rows + u64::from(row.state)) * element,
            false => (u64::from(row.state) * all + before + local) * element,
        }
    }

    /// H, N, C and packing of the page, tensor by tensor.
    fn vllm_pages(&self) -> Vec<(u32, u32, u32, Packing)> {
        let n = self.tokens;
        let local = |role| self.local(role).1;
        match self.what.clone() {
            What::Kv { heads, bytes } => {
                let dtype = Dtype::Fp8;
                let packing =
                    Packing::KeyValue { total_heads: heads, key_bytes: bytes, value_bytes: bytes, dtype };
                vec![(local(Role::Key), n, 2 * bytes, packing)]
            }
            What::Scaled { heads, bytes } => {
                let (key_bytes, value_bytes) = (bytes, bytes);
                let format = "int8_per_token_head".into();
                let packing = Packing::ScaledKeyValue { total_heads: heads, key_bytes, value_bytes, format };
                vec![(local(Role::Key), n, 2 * bytes + 8, packing)]
            }
            What::Nvfp4 { heads, data, scale } => {
                let packing = Packing::Nvfp4 { total_heads: heads, data_bytes: data, scale_bytes: scale };
                vec![(2 * local(Role::Key), n, data + scale, packing)]
            }
            What::OpaqueHeads { heads, bytes } => {
                let packing = Packing::OpaqueHeads { total_heads: heads, format: "cpu amx".into() };
                vec![(local(Role::Opaque), n, bytes, packing)]
            }
            What::Latent { row } => vec![(1, n, row, Packing::Latent { format: "fp8".into() })],
            What::LatentIndex { row, key, scale } => {
                let (key_bytes, scale_bytes, format) = (key, scale, "fp8".into());
                let index = Packing::Index { key_bytes, scale_bytes, format };
                vec![(1, n, row, Packing::Latent { format: "fp8_ds_mla".into() }), (1, n, key + scale, index)]
            }
            What::OpaquePage { row } => {
                vec![(1, n, row, Packing::OpaquePage { format: "nvfp4_ds_mla".into() })]
            }
            What::State { replicated, .. } => {
                vec![(
                    1,
                    1,
                    self.page_of_first_layer() as u32,
                    Packing::States { parts: self.parts(), replicated },
                )]
            }
        }
    }

    fn vllm(&self, order: Order, align: u64, pad: u64, kernel: u32) -> Option<(Shard, u64, Oracle)> {
        let outer = order.is_block_outermost();
        let kernel = if outer || !self.tokens.is_multiple_of(kernel) { 1 } else { kernel };
        let tied =
            matches!(self.what, What::Nvfp4 { .. } | What::OpaqueHeads { .. } | What::OpaquePage { .. });
        let kernel = if tied || matches!(self.what, What::State { .. }) { 1 } else { kernel };
        let pages = self.vllm_pages();
        let torn = matches!(order, Order::Lhbnc | Order::Bhlnc);
        let nhd = matches!(order, Order::Lbnhc | Order::Blnhc);
        let heads = pages[0].0;
        let own = matches!(self.what, What::Nvfp4 { .. } | What::OpaqueHeads { .. });
        if (torn && heads > 1 && matches!(self.what, What::Nvfp4 { .. })) || (nhd && own && heads > 1) {
            return None;
        }
        let pad = if torn && heads > 1 || kernel > 1 { 0 } else { pad };
        let align = if kernel > 1 || torn && !outer { 0 } else { align };
        let kernel = if torn && heads > 1 { 1 } else { kernel };
        let (layers, blocks) = (self.layers.len() as u64, self.blocks);
        let bytes_of =
            |page: &(u32, u32, u32, Packing)| u64::from(page.0) * u64::from(page.1) * u64::from(page.2);
        let page_bytes = |page: &(u32, u32, u32, Packing)| bytes_of(page) + pad;
        // Several tensors of different pages need block-compact orders.
        if pages.len() > 1 && torn {
            return None;
        }
        let per_block: u64 = pages.iter().map(|page| layers * page_bytes(page)).sum();
        let smallest = pages.iter().map(page_bytes).min()?;
        let align = if outer { align % smallest } else { align };
        let mut declared = Vec::new();
        let mut starts = Vec::new();
        let mut offset = 0;
        for (index, page) in pages.iter().enumerate() {
            let whole = page_bytes(page);
            let run = u64::from(page.1) * u64::from(page.2);
            let (layer_stride, block_stride) = match order {
                Order::Lbnhc | Order::Lbhnc => (blocks * (whole + align), whole + align),
                Order::Lhbnc if pad > 0 => (blocks * whole, whole),
                Order::Lhbnc => (blocks * whole, run),
                Order::Blhnc | Order::Blnhc => (whole, per_block + align),
                Order::Bhlnc if pad > 0 => (whole, per_block + align),
                Order::Bhlnc => (run, per_block + align),
            };
            let kind = if index == 0 { "attn" } else { "indexer.k_cache" };
            let names = self.layers.iter().map(|layer| format!("model.layers.{layer}.{kind}")).collect();
            let tensor = KvCacheTensor { size: 0, offset, layer_stride, block_stride, layers: names };
            starts.push((offset, layer_stride, block_stride, whole));
            declared.push((tensor, page.clone()));
            offset += layers * if outer { whole } else { layer_stride };
        }
        let size = if outer { (per_block + align) * blocks } else { offset };
        let memory_bytes = size + 5;
        let pages_of = declared.into_iter().map(|(tensor, (heads, states, content_bytes, packing))| Pages {
            tensor: KvCacheTensor { size, ..tensor },
            heads,
            states,
            content_bytes,
            page_bytes: u64::from(heads) * u64::from(states) * u64::from(content_bytes) + pad,
            kernel_blocks: kernel,
            packing,
        });
        let group = Group { block_tokens: self.tokens, pages: pages_of.collect() };
        let pool = Pool { order, num_blocks: blocks, memory_bytes, rank: self.rank };
        let shard = shards(pool, &[group]).unwrap_or_else(|refusal| panic!("{self:?} {order}: {refusal}"));
        let (setup, layers) = (self.clone(), layers);
        let at = move |block: u64, row: Row| {
            let index = usize::from(matches!(row.role, Role::IndexKey | Role::IndexScale));
            let (start, layer_stride, block_stride, _) = starts[index];
            let (heads, states, content, _) = &pages[index];
            let (heads, states, content) = (u64::from(*heads), u64::from(*states), u64::from(*content));
            let (_, layer, head) = setup.indices(row);
            let small = states / u64::from(kernel);
            let page = start + layer * layer_stride + block * block_stride;
            let (n, m) = (u64::from(row.state) / small, u64::from(row.state) % small);
            let cell = |h: u64| match order {
                Order::Lbnhc | Order::Blnhc => page + ((n * small + m) * heads + h) * content,
                Order::Lbhnc | Order::Blhnc => page + ((n * heads + h) * small + m) * content,
                Order::Lhbnc => {
                    let torn = heads > 1;
                    let row = n * small + m;
                    match torn {
                        true => (((layer * heads + h) * blocks + block) * states + row) * content,
                        false => page + row * content,
                    }
                }
                Order::Bhlnc => {
                    let torn = heads > 1;
                    let row = n * small + m;
                    match torn {
                        true => block * block_stride + ((h * layers + layer) * states + row) * content,
                        false => page + row * content,
                    }
                }
            };
            match &setup.what {
                What::Kv { bytes, .. } => {
                    cell(head) + if row.role == Role::Value { u64::from(*bytes) } else { 0 }
                }
                What::Scaled { bytes, .. } => {
                    let bytes = u64::from(*bytes);
                    let inner = match row.role {
                        Role::Key => 0,
                        Role::KeyScale => bytes,
                        Role::Value => bytes + 4,
                        _ => 2 * bytes + 4,
                    };
                    cell(head) + inner
                }
                What::Nvfp4 { data, scale, .. } => {
                    let (data, scale, half) = (u64::from(*data), u64::from(*scale), heads / 2);
                    let value = matches!(row.role, Role::Value | Role::ValueScale);
                    let side = page + u64::from(value) * half * states * (data + scale);
                    match row.role {
                        Role::Key | Role::Value => side + (head * states + u64::from(row.state)) * data,
                        _ => side + half * states * data + head * states * scale,
                    }
                }
                What::OpaqueHeads { .. } => cell(head),
                What::Latent { .. } => cell(0),
                What::LatentIndex { key, scale, .. } => {
                    let (key, scale) = (u64::from(*key), u64::from(*scale));
                    let kernel_page = page + n * small * content;
                    match row.role {
                        Role::Latent => cell(0),
                        Role::IndexKey => kernel_page + m * key,
                        _ => kernel_page + small * key + m * scale,
                    }
                }
                What::OpaquePage { .. } => page,
                What::State { .. } => page + setup.in_state(row),
            }
        };
        Some((shard.into_iter().next()?, memory_bytes, Box::new(at)))
    }

    fn vllm_planes(&self, order: Order) -> Option<(Shard, u64, Oracle)> {
        let What::Kv { heads, bytes } = self.what else { return None };
        if !matches!(order, Order::Lbnhc | Order::Lbhnc) {
            return None;
        }
        let (layers, blocks, local) = (self.layers.len() as u64, self.blocks, self.local(Role::Key).1);
        let page = 2 * u64::from(self.tokens) * u64::from(local * bytes);
        let size = layers * blocks * page;
        let names = self.layers.iter().map(|layer| format!("layers.{layer}")).collect();
        let tensor =
            KvCacheTensor { size, offset: 0, layer_stride: blocks * page, block_stride: page, layers: names };
        let pages = Pages {
            tensor,
            heads: 2,
            states: self.tokens,
            content_bytes: local * bytes,
            page_bytes: page,
            kernel_blocks: 1,
            packing: Packing::KeyValuePlanes { total_heads: heads, head_bytes: bytes, dtype: Dtype::Fp8 },
        };
        let group = Group { block_tokens: self.tokens, pages: vec![pages] };
        let pool = Pool { order, num_blocks: blocks, memory_bytes: size, rank: self.rank };
        let shard = shards(pool, &[group]).expect("planes of keys and values").into_iter().next()?;
        let setup = self.clone();
        let at = move |block: u64, row: Row| {
            let (side, layer, head) = setup.indices(row);
            let (n, local, bytes) = (u64::from(setup.tokens), u64::from(local), u64::from(bytes));
            let state = u64::from(row.state);
            let cell = if order == Order::Lbhnc { side * n + state } else { state * 2 + side };
            (((layer * blocks + block) * 2 * n + cell) * local + head) * bytes
        };
        Some((shard, size, Box::new(at)))
    }

    /// The stored form: rows that divide alike side by side, heads in order, channels by rows.
    fn record(&self) -> (Shard, u64, Oracle) {
        let engine = Engine::Vllm { order: Order::Lbhnc, align: 0, pad: 0, kernel: 1 };
        let content = self.world(&engine).expect("vLLM holds everything").shard.content().clone();
        let planes = content.planes().to_vec();
        let parts = planes.iter().enumerate().map(|(plane, of)| Part {
            plane,
            layers: self.layers.clone(),
            heads: {
                let (first, count) = self.local(of.role);
                first..first + count
            },
        });
        let shard = Shard::record_of(content, parts.collect()).expect("a record");
        let planes = self.what.planes(self.tokens);
        let setup = self.clone();
        let bytes = shard.block_bytes();
        // Bundles: keys, values and scales by row; everything of another length by itself.
        let bundle = |plane: &TestPlane| match plane.0 {
            Role::State(part) => 10 + u32::from(part),
            Role::Latent => 50,
            Role::IndexKey => 51,
            Role::IndexScale => 52,
            _ => {
                let lead = planes.iter().position(|other| (other.1, other.2) == (plane.1, plane.2));
                lead.map_or(0, |lead| lead as u32)
            }
        };
        let keys: Vec<u32> = planes.iter().map(bundle).collect();
        // Planes of a bundle must follow each other; scales of nvfp4 do not.
        let runs: Vec<(usize, usize)> = (0..planes.len())
            .map(|at| {
                let first = (0..=at).rev().take_while(|other| keys[*other] == keys[at]).last().unwrap_or(at);
                let last =
                    (at..planes.len()).take_while(|other| keys[*other] == keys[at]).last().unwrap_or(at);
                (first, last + 1)
            })
            .collect();
        let at = move |_: u64, row: Row| {
            let layers = setup.layers.len() as u64;
            let at = planes.iter().position(|plane| plane.0 == row.role).expect("a plane");
            let size = |plane: &TestPlane| {
                let (_, count) = held(plane.1, plane.4, setup.rank);
                u64::from(count) * u64::from(plane.2) * u64::from(plane.3)
            };
            let (first, last) = runs[at];
            let before: u64 = planes[..first].iter().map(|plane| layers * size(plane)).sum();
            let width: u64 = planes[first..last].iter().map(|plane| u64::from(plane.3)).sum();
            let inner: u64 = planes[first..at].iter().map(|plane| u64::from(plane.3)).sum();
            let (_, layer, head) = setup.indices(row);
            let (_, heads) = setup.local(row.role);
            let (heads, states, state) = (u64::from(heads), u64::from(planes[at].2), u64::from(row.state));
            let channels = matches!(setup.what, What::State { ref parts, replicated, .. }
                if !replicated && at < parts.len());
            let cell = if channels { state * heads + head } else { head * states + state };
            before + (layer * heads * states + cell) * width + inner
        };
        (shard, bytes, Box::new(at))
    }
}
