//! Requests as chains of blocks.

use std::collections::HashMap;

use crate::host::{Policy as _, classic::Lru};

/// A block: an index below [`Trace::blocks`]. Equal blocks are equal prefixes.
pub type Block = u32;

/// Input tokens per id in Mooncake's traces.
const MOONCAKE_BLOCK_TOKENS: u64 = 512;

/// What one request does to the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The prompt's full blocks, then those of the answer: each is the child of the one before.
    pub blocks: Vec<Block>,
    /// The first block that is asked for: the engine has those before it.
    pub from: usize,
    /// The end of the prompt: what follows is written only.
    pub asked: usize,
}

/// A workload.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Its name.
    pub name: String,
    /// In the order of their arrival.
    pub requests: Vec<Request>,
    parents: Vec<Option<Block>>,
    depths: Vec<u32>,
}

impl Trace {
    /// Takes requests whose blocks are named by any numbers.
    ///
    /// # Errors
    /// A block has two parents: then the ids do not stand for prefixes.
    pub fn new(name: &str, requests: impl IntoIterator<Item = (Vec<u64>, usize)>) -> Result<Self, String> {
        let mut ids: HashMap<u64, Block> = HashMap::new();
        let mut trace =
            Self { name: name.to_owned(), requests: Vec::new(), parents: Vec::new(), depths: Vec::new() };
        for (line, (names, asked)) in requests.into_iter().enumerate() {
            let mut blocks: Vec<Block> = Vec::with_capacity(names.len());
            for name in names {
                let parent = blocks.last().copied();
                let next = trace.parents.len() as Block;
                let block = *ids.entry(name).or_insert(next);
                if block == next {
                    trace.parents.push(parent);
                    trace.depths.push(blocks.len() as u32);
                } else if trace.parents[block as usize] != parent {
                    return Err(format!(
                        "request {}: expected block {name} behind the block that it followed before",
                        line + 1
                    ));
                }
                blocks.push(block);
            }
            if !blocks.is_empty() {
                trace.requests.push(Request { blocks, from: 0, asked });
            }
        }
        Ok(trace)
    }

    /// Reads Mooncake's format: a JSON object a line with `timestamp`, `input_length`, `output_length` and
    /// `hash_ids`. The last id of a line stands for a part of a block, unless the length fits: it is left
    /// out, as only full blocks are saved. What the answer's blocks were, the format does not say.
    ///
    /// # Errors
    /// A line is not of that form, or the ids do not stand for prefixes.
    pub fn mooncake(name: &str, text: &str) -> Result<Self, String> {
        let mut lines: Vec<(u64, Vec<u64>)> = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let bad = |what: &str| format!("line {}: expected {what}", number + 1);
            let value: serde_json::Value = serde_json::from_str(line).map_err(|_| bad("a JSON object"))?;
            let field = |name: &str| value[name].as_u64().ok_or_else(|| bad(&format!("a number as {name}")));
            let full = (field("input_length")? / MOONCAKE_BLOCK_TOKENS) as usize;
            let ids = value["hash_ids"].as_array().ok_or_else(|| bad("an array as hash_ids"))?;
            let ids: Option<Vec<u64>> = ids.iter().take(full).map(serde_json::Value::as_u64).collect();
            lines.push((field("timestamp")?, ids.ok_or_else(|| bad("numbers as hash_ids"))?));
        }
        // Stable: the file's order holds among equal times.
        lines.sort_by_key(|(time, _)| *time);
        Self::new(name, lines.into_iter().map(|(_, ids)| (ids.clone(), ids.len())))
    }

    /// Distinct blocks.
    pub fn blocks(&self) -> usize {
        self.parents.len()
    }

    /// The block before it in every request.
    pub fn parent(&self, block: Block) -> Option<Block> {
        self.parents[block as usize]
    }

    /// How many blocks are before it.
    pub fn depth(&self, block: Block) -> u32 {
        self.depths[block as usize]
    }

    /// Blocks that are asked for.
    pub fn asked(&self) -> u64 {
        self.requests.iter().map(|request| (request.asked - request.from) as u64).sum()
    }

    /// What reaches the sidecar when the engine has a prefix cache of its own, of so many blocks: LRU, last
    /// blocks first, as vLLM's is.
    #[must_use]
    pub fn behind_engine(&self, capacity: usize) -> Self {
        let mut engine = Lru::new(self, capacity, true);
        let mut trace = self.clone();
        trace.name = format!("{}, behind an engine's cache", self.name);
        for request in &mut trace.requests {
            let prompt = &request.blocks[..request.asked];
            let local = prompt.iter().take_while(|block| engine.holds(**block)).count();
            engine.serve(request, local);
            request.from = local;
        }
        trace
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mooncakes_format_is_read_in_the_order_of_time_and_without_the_last_part_of_a_block() {
        let text = r#"{"timestamp": 5, "input_length": 1536, "output_length": 1, "hash_ids": [7, 8, 9]}
{"timestamp": 3, "input_length": 1100, "output_length": 1, "hash_ids": [7, 8, 4]}
{"timestamp": 4, "input_length": 100, "output_length": 1, "hash_ids": [7]}
"#;
        let trace = Trace::mooncake("t", text).unwrap();
        let blocks: Vec<_> = trace.requests.iter().map(|request| request.blocks.clone()).collect();
        assert_eq!(blocks, [vec![0, 1], vec![0, 1, 2]]);
        assert_eq!((trace.blocks(), trace.asked()), (3, 5));
        assert_eq!((trace.parent(0), trace.parent(2), trace.depth(2)), (None, Some(1), 2));
    }

    #[test]
    fn what_is_not_a_trace_is_refused_with_its_line() {
        assert_eq!(Trace::mooncake("t", "\nno").unwrap_err(), "line 2: expected a JSON object");
        let text = r#"{"timestamp": 5, "input_length": 1536, "hash_ids": 3}"#;
        assert_eq!(Trace::mooncake("t", text).unwrap_err(), "line 1: expected an array as hash_ids");
        let error = Trace::new("t", [(vec![1, 2], 2), (vec![3, 2], 2)]).unwrap_err();
        assert_eq!(error, "request 2: expected block 2 behind the block that it followed before");
    }

    #[test]
    fn an_engines_cache_takes_the_front_of_a_prompt() {
        let trace = Trace::new("t", [(vec![1, 2, 3], 3), (vec![1, 2, 4], 3), (vec![5, 6], 2), (vec![1], 1)]);
        let from: Vec<_> = trace.unwrap().behind_engine(3).requests.iter().map(|r| r.from).collect();
        assert_eq!(from, [0, 2, 0, 1], "the root is the youngest of the old");
    }
}
