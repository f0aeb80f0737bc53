//! The pools of TensorRT-LLM, SGLang and Blade-KVT.

use pillion_layouts::blade_kvt::{self, Shape};
use pillion_layouts::sglang::{self, HostPool, PoolOrder};
use pillion_layouts::tensorrt_llm::{self, Buffer, LayerGroup, PageOrder, PrimaryPool, Region};
use pillion_layouts::{Role, Shard};

use super::{Oracle, Row, Setup, What};

impl Setup {
    pub(super) fn trt_v1(&self, order: PageOrder) -> (Shard, u64, Oracle) {
        let attention = self.attention();
        let setup = self.clone();
        let (layers, tokens) = (self.layers.len() as u64, u64::from(self.tokens));
        let (role, sides) = self.lead();
        let (heads, row_bytes) = (u64::from(self.local(role).1), u64::from(self.plane(role).3));
        let page = heads * tokens * row_bytes;
        let bytes = self.blocks * layers * sides * page;
        let pool = PrimaryPool {
            num_blocks: self.blocks,
            layers: self.layers.clone(),
            tokens_per_block: self.tokens,
            attention,
            order,
            rank: self.rank,
            pools: 1,
            memory_bytes: bytes,
        };
        let at = move |block: u64, row: Row| {
            let (side, layer, head) = setup.indices(row);
            let field = (block * layers + layer) * sides + side;
            field * page + in_page(order, heads, tokens, head, row.state.into()) * row_bytes
        };
        (tensorrt_llm::primary(&pool).expect("a V1 pool"), bytes, Box::new(at))
    }

    fn lead(&self) -> (Role, u64) {
        if matches!(self.what, What::Kv { .. }) { (Role::Key, 2) } else { (Role::Latent, 1) }
    }

    /// Two regions: even layers' pages in one, odd layers' in another, roles in turn.
    pub(super) fn trt_v2(&self, order: PageOrder) -> (Shard, u64, Oracle) {
        let setup = self.clone();
        let (role, sides) = self.lead();
        let tokens = u64::from(self.tokens);
        let (heads, row_bytes) = (u64::from(self.local(role).1), u64::from(self.plane(role).3));
        let page = heads * tokens * row_bytes;
        let (mut regions, mut base) = (Vec::new(), 1000);
        for odd in [0, 1] {
            let here = self.layers.iter().enumerate().filter(|(at, _)| at % 2 == odd);
            let buffer = |layer: u32, role: &str| Buffer { layer, role: role.into(), expansion: 1 };
            let buffers: Vec<Buffer> = here
                .flat_map(|(_, layer)| {
                    let value = (sides == 2).then(|| buffer(*layer, "value"));
                    [Some(buffer(*layer, "key")), value].into_iter().flatten()
                })
                .collect();
            if buffers.is_empty() {
                continue;
            }
            let size = buffers.len() as u64 * page;
            let stride = size + 3 + odd as u64;
            regions.push(Region { base, size, stride, num_slots: self.blocks, buffers });
            base += stride * self.blocks + 11;
        }
        let places: Vec<(u64, u64)> = regions.iter().map(|region| (region.base, region.stride)).collect();
        let group = LayerGroup {
            tokens_per_block: self.tokens,
            attention: self.attention(),
            index_page_bytes: None,
            order,
            rank: self.rank,
            regions,
        };
        let at = move |block: u64, row: Row| {
            let (side, layer, head) = setup.indices(row);
            let (base, stride) = places[(layer % 2) as usize];
            let buffer = layer / 2 * sides + side;
            base + block * stride
                + buffer * page
                + in_page(order, heads, tokens, head, row.state.into()) * row_bytes
        };
        (tensorrt_llm::layer_group(&group).expect("a V2 group"), base, Box::new(at))
    }

    pub(super) fn sglang(&self, order: PoolOrder) -> Option<(Shard, u64, Oracle)> {
        let (role, sides) = self.lead();
        if sides == 1 && order == PoolOrder::PageHead {
            return None;
        }
        let setup = self.clone();
        let (layers, tokens, pages) = (self.layers.len() as u64, u64::from(self.tokens), self.blocks);
        let (heads, row_bytes) = (u64::from(self.local(role).1), u64::from(self.plane(role).3));
        let bytes = sides * layers * tokens * pages * heads * row_bytes;
        let pool = HostPool {
            order,
            pages,
            page_tokens: self.tokens,
            layers: self.layers.clone(),
            attention: self.attention(),
            rank: self.rank,
            memory_bytes: bytes,
        };
        let at = move |page: u64, row: Row| {
            let (side, layer, head) = setup.indices(row);
            let (in_page, token) = (u64::from(row.state), page * tokens + u64::from(row.state));
            let index = match order {
                PoolOrder::LayerFirst => ((side * layers + layer) * pages * tokens + token) * heads + head,
                PoolOrder::PageFirst => ((side * pages * tokens + token) * layers + layer) * heads + head,
                PoolOrder::PageFirstDirect => {
                    (((side * pages + page) * layers + layer) * tokens + in_page) * heads + head
                }
                PoolOrder::PageHead => {
                    (((side * pages + page) * heads + head) * tokens + in_page) * layers + layer
                }
            };
            index * row_bytes
        };
        Some((sglang::shard(&pool).expect("a host pool"), bytes, Box::new(at)))
    }

    pub(super) fn blade(
        &self,
        shape: Shape,
        kernel: u32,
        pack: u32,
        pad: u64,
    ) -> Option<(Shard, u64, Oracle)> {
        let (role, sides) = self.lead();
        let shape = if sides == 1 { Shape::Ragged } else { shape };
        let flash = shape == Shape::Flash;
        let kernel_tokens =
            if self.tokens.is_multiple_of(kernel) { self.tokens / kernel } else { self.tokens };
        let pack = if flash || !self.layers.len().is_multiple_of(pack as usize) { 1 } else { pack };
        let pad = if flash { 0 } else { pad };
        let (heads, row_bytes) = (u64::from(self.local(role).1), u64::from(self.plane(role).3));
        let (tokens, kn) = (u64::from(self.tokens), u64::from(kernel_tokens));
        let token = sides * heads * row_bytes;
        let block_bytes = token * tokens * u64::from(pack) + pad;
        let tensor = |index: usize| 64 + index as u64 * (block_bytes * self.blocks + 9);
        let chunks: Vec<Vec<u32>> = self.layers.chunks(pack as usize).map(<[u32]>::to_vec).collect();
        let count = chunks.len();
        let tensors = blade_kvt::Tensors {
            rank: self.rank,
            tensors: (0..)
                .zip(chunks)
                .map(|(index, layers)| blade_kvt::Tensor { base: tensor(index), layers })
                .collect(),
            num_blocks: self.blocks,
            block_bytes,
            tensor_bytes: block_bytes * self.blocks,
        };
        let pages = blade_kvt::Pages {
            shape,
            block_tokens: self.tokens,
            kernel_tokens,
            pack,
            token_bytes: token,
            attention: self.attention(),
        };
        let shard = blade_kvt::attention(&tensors, &pages).expect("blade tensors");
        let (setup, blocks, pack) = (self.clone(), self.blocks, u64::from(pack));
        let starts: Vec<u64> = (0..count).map(tensor).collect();
        let at = move |block: u64, row: Row| {
            let (side, layer, head) = setup.indices(row);
            let start = starts[(layer / pack) as usize];
            let (k, t) = (u64::from(row.state) / kn, u64::from(row.state) % kn);
            let page = start + block * block_bytes + (k * pack + layer % pack) * (kn * token);
            match shape {
                Shape::Ragged => page + ((t * sides + side) * heads + head) * row_bytes,
                Shape::Flash => {
                    let t = u64::from(row.state);
                    start + (((side * blocks + block) * tokens + t) * heads + head) * row_bytes
                }
                Shape::KernelFlash => page + ((side * kn + t) * heads + head) * row_bytes,
                Shape::KernelHnd => page + ((side * heads + head) * kn + t) * row_bytes,
            }
        };
        Some((shard, tensor(count), Box::new(at)))
    }

    pub(super) fn blade_state(&self, pad: u64) -> (Shard, u64, Oracle) {
        let What::State { replicated, .. } = self.what else { panic!("not a state") };
        let page = self.page_of_first_layer();
        let block_bytes = page + pad;
        let blocks = self.blocks;
        let start = move |layer: u64| layer * (block_bytes * blocks + 3);
        let tensors = blade_kvt::Tensors {
            rank: self.rank,
            tensors: (0..)
                .zip(&self.layers)
                .map(|(at, layer)| blade_kvt::Tensor { base: start(at), layers: vec![*layer] })
                .collect(),
            num_blocks: blocks,
            block_bytes,
            tensor_bytes: block_bytes * blocks,
        };
        let shard = blade_kvt::state(&tensors, self.tokens, &self.parts(), replicated).expect("a state");
        let setup = self.clone();
        let at = move |block: u64, row: Row| {
            let (_, layer, _) = setup.indices(row);
            start(layer) + block * block_bytes + setup.in_state(row)
        };
        (shard, start(self.layers.len() as u64), Box::new(at))
    }
}

fn in_page(order: PageOrder, heads: u64, tokens: u64, head: u64, token: u64) -> u64 {
    match order {
        PageOrder::Hnd => head * tokens + token,
        PageOrder::Nhd => token * heads + head,
    }
}
