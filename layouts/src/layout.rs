//! Layouts as data: regions of strided axes, checked when they are made.

use std::collections::HashSet;

use crate::refusal::{Refusal, shown};
use crate::shape::{Dtype, Kind, LogicalShape, Sharding};

/// One axis of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dim {
    /// How many steps.
    pub len: u64,
    /// Bytes from one to the next.
    pub stride: u64,
}

/// Equally shaped layers at regular distances.
///
/// Byte `c` of (layer, block, head, state) is at
/// `offset + Σ index × stride + c`. Where the head axis lies follows from its
/// stride; that the content is contiguous is the one thing all engines share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Index, in the layout, of the region's first layer.
    pub first_layer: u32,
    /// Byte of the allocation at which the first layer's block 0 starts.
    pub offset: u64,
    /// The layers.
    pub layers: Dim,
    /// The blocks.
    pub blocks: Dim,
    /// The heads of a page.
    pub heads: Dim,
    /// The states of a page.
    pub states: Dim,
    /// C: contiguous bytes of one (head, state).
    pub content_bytes: u64,
    /// Bytes of an element; C is a multiple of it.
    pub element_bytes: u32,
    /// How the region divides between ranks.
    pub sharding: Sharding,
}

impl Region {
    /// The extent in bytes of the given axes around the content. `Overlap` when the axes do
    /// not nest, that is when two coordinates could mean the same byte.
    fn extent(&self, mut axes: Vec<Dim>, index: usize) -> Result<u64, Refusal> {
        let overflow = Refusal::Overflow { what: "extent of a region" };
        axes.retain(|axis| axis.len > 1);
        axes.sort_by_key(|axis| axis.stride);
        let mut extent = self.content_bytes;
        for axis in axes {
            if axis.stride < extent {
                return Err(Refusal::Overlap { first: index, second: index });
            }
            let reach = axis.stride.checked_mul(axis.len - 1).and_then(|far| far.checked_add(extent));
            extent = reach.ok_or(overflow.clone())?;
        }
        Ok(extent)
    }

    fn last_layer(&self) -> u64 {
        u64::from(self.first_layer) + self.layers.len
    }
}

/// What a record holds, independent of where an engine keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// The logical shape of a block.
    pub shape: LogicalShape,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Element format.
    pub dtype: Dtype,
    /// Kind of the group.
    pub kind: Kind,
    /// How the content divides between ranks.
    pub sharding: Sharding,
    /// Names of the layers, in the order in which a record holds them.
    pub layers: Vec<String>,
}

impl Content {
    /// See [`Layout::format`].
    fn format(&self) -> String {
        let LogicalShape { layers, heads, states, content_bytes } = self.shape;
        let mut out = format!(
            "pillion-record/1 kind={} sharding={} dtype={} block_tokens={} axes=LHNC layers={layers} \
             heads={heads} states={states} content_bytes={content_bytes} names=[",
            self.kind, self.sharding, self.dtype, self.block_tokens
        );
        for (index, name) in self.layers.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            for c in name.chars() {
                match c {
                    // Escaped so that two lists of names never give one text.
                    '\\' | ',' | ']' => out.extend(['\\', c]),
                    c if c.is_control() => out.extend(c.escape_default()),
                    c => out.push(c),
                }
            }
        }
        out.push(']');
        out
    }
}

/// Where the blocks of one allocation are. Only checked layouts exist: every byte of every
/// block lies inside the memory, and no two coordinates share a byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    content: Content,
    num_blocks: u64,
    memory_bytes: u64,
    record_bytes: u64,
    regions: Vec<Region>,
}

impl Layout {
    /// Checks and makes a layout. Regions hold the layers in order, without gaps.
    pub(crate) fn new(content: Content, memory_bytes: u64, regions: Vec<Region>) -> Result<Layout, Refusal> {
        let record_bytes = check_content(&content)?;
        let first = regions.first().ok_or(Refusal::Zero { what: "tensors" })?;
        let num_blocks = first.blocks.len;
        if num_blocks == 0 {
            return Err(Refusal::Zero { what: "blocks" });
        }
        let shape = content.shape;
        debug_assert!(regions.iter().all(|region| {
            (region.heads.len, region.states.len) == (shape.heads.into(), shape.states.into())
                && region.content_bytes == u64::from(shape.content_bytes)
        }));
        let held = regions.iter().try_fold(0, |at, region| {
            (u64::from(region.first_layer) == at && region.blocks.len == num_blocks)
                .then(|| region.last_layer())
        });
        let names = content.layers.len() as u64;
        if held != Some(names) || u64::from(shape.layers) != names {
            return Err(Refusal::LayerCount { expected: held.unwrap_or(0), got: names });
        }
        check_regions(&regions, memory_bytes)?;
        Ok(Layout { content, num_blocks, memory_bytes, record_bytes, regions })
    }

    /// The stored form: one block, `[L, H, N, C]`, without gaps.
    pub fn record(content: Content) -> Result<Layout, Refusal> {
        let record_bytes = check_content(&content)?;
        let shape = content.shape;
        let content_bytes = u64::from(shape.content_bytes);
        // Cannot overflow: each is at most the record, which was checked.
        let head = content_bytes * u64::from(shape.states);
        let page = head * u64::from(shape.heads);
        let region = Region {
            first_layer: 0,
            offset: 0,
            layers: Dim { len: shape.layers.into(), stride: page },
            blocks: Dim { len: 1, stride: record_bytes },
            heads: Dim { len: shape.heads.into(), stride: head },
            states: Dim { len: shape.states.into(), stride: content_bytes },
            content_bytes,
            element_bytes: content.dtype.element_bytes(),
            sharding: content.sharding.clone(),
        };
        Layout::new(content, record_bytes, vec![region])
    }

    /// The logical shape of a block.
    pub fn shape(&self) -> LogicalShape {
        self.content.shape
    }

    /// What a block holds.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// The number of blocks; block ids are below it.
    pub fn num_blocks(&self) -> u64 {
        self.num_blocks
    }

    /// Bytes of the allocation that the addresses refer to.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Bytes of one stored block: L × H × N × C.
    pub fn record_bytes(&self) -> u64 {
        self.record_bytes
    }

    /// Layer names, in the order in which a record holds them.
    pub fn layer_names(&self) -> &[String] {
        &self.content.layers
    }

    /// The regions, in layer order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Byte offset, from the allocation's base, of the C contiguous bytes of a cell; `None` if
    /// there is no such cell. For checks and explanations: copies come from [`crate::plan`].
    pub fn address(&self, layer: u32, block: u64, head: u32, state: u32) -> Option<u64> {
        let shape = self.content.shape;
        if block >= self.num_blocks || head >= shape.heads || state >= shape.states {
            return None;
        }
        let holds = |region: &&Region| layer >= region.first_layer && u64::from(layer) < region.last_layer();
        let region = self.regions.iter().find(holds)?;
        let steps = [
            (u64::from(layer - region.first_layer), region.layers),
            (block, region.blocks),
            (head.into(), region.heads),
            (state.into(), region.states),
        ];
        // Cannot overflow: `new` checked that the last byte lies inside the memory.
        Some(region.offset + steps.iter().map(|(index, axis)| index * axis.stride).sum::<u64>())
    }

    /// A canonical, readable description of what a record holds: kind, sharding, dtype, shape and
    /// layers in order. It does not depend on the engine's physical order, so layouts with equal
    /// formats may share records, *within one namespace*: what a backend packs into the bytes of a
    /// page is the namespace's business.
    pub fn format(&self) -> String {
        self.content.format()
    }
}

/// Checks what does not depend on a place, and returns the bytes of a record.
fn check_content(content: &Content) -> Result<u64, Refusal> {
    let shape = content.shape;
    let extents = [
        ("layers", shape.layers),
        ("heads", shape.heads),
        ("states", shape.states),
        ("content bytes", shape.content_bytes),
        ("block tokens", content.block_tokens),
    ];
    if let Some((what, _)) = extents.into_iter().find(|(_, extent)| *extent == 0) {
        return Err(Refusal::Zero { what });
    }
    let element_bytes = content.dtype.element_bytes();
    if !shape.content_bytes.is_multiple_of(element_bytes) {
        let (content_bytes, dtype) = (shape.content_bytes, content.dtype.to_string());
        return Err(Refusal::ElementSize { content_bytes, element_bytes, dtype });
    }
    let (expected, got) = (u64::from(shape.layers), content.layers.len() as u64);
    if expected != got {
        return Err(Refusal::LayerCount { expected, got });
    }
    let mut seen = HashSet::with_capacity(content.layers.len());
    for (index, name) in content.layers.iter().enumerate() {
        if name.is_empty() {
            return Err(Refusal::UnnamedLayer { index });
        }
        if !seen.insert(name.as_str()) {
            return Err(Refusal::DuplicateLayer { name: shown(name) });
        }
    }
    shape.block_bytes().ok_or(Refusal::Overflow { what: "bytes of a block" })
}

/// Where a region's bytes are: of all its blocks, and of its block 0.
struct Footprint {
    region: usize,
    start: u64,
    end: u64,
    block_end: u64,
    block_stride: u64,
}

/// Every region nests, lies inside the memory, and shares no byte with another.
fn check_regions(regions: &[Region], memory_bytes: u64) -> Result<(), Refusal> {
    let mut prints = Vec::with_capacity(regions.len());
    for (index, region) in regions.iter().enumerate() {
        let of_block = vec![region.layers, region.heads, region.states];
        let of_all = vec![region.layers, region.heads, region.states, region.blocks];
        let place = |extent: u64| {
            let end = region.offset.checked_add(extent);
            end.ok_or(Refusal::Overflow { what: "end of a region" })
        };
        let end = place(region.extent(of_all, index)?)?;
        let block_end = place(region.extent(of_block, index)?)?;
        if end > memory_bytes {
            return Err(Refusal::OutsideMemory { region: index, end, memory_bytes });
        }
        let (start, block_stride) = (region.offset, region.blocks.stride);
        prints.push(Footprint { region: index, start, end, block_end, block_stride });
    }
    check_disjoint(prints)
}

/// Regions lie either one after the other, or side by side inside equal block strides.
fn check_disjoint(mut prints: Vec<Footprint>) -> Result<(), Refusal> {
    prints.sort_by_key(|print| print.start);
    let Some(first) = prints.first() else { return Ok(()) };
    let (base, stride) = (first.start, first.block_stride);
    let apart = |a: &Footprint, b: &Footprint| a.end <= b.start;
    let beside = |a: &Footprint, b: &Footprint| {
        b.block_stride == stride && a.block_end <= b.start && b.block_end - base <= stride
    };
    let pairs = || prints.windows(2).map(|pair| (&pair[0], &pair[1]));
    if pairs().all(|(a, b)| apart(a, b)) || pairs().all(|(a, b)| beside(a, b)) {
        return Ok(());
    }
    let culprit = pairs().find(|(a, b)| !apart(a, b)).map_or((0, 0), |(a, b)| (a.region, b.region));
    Err(Refusal::Overlap { first: culprit.0, second: culprit.1 })
}
