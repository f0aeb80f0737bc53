//! Made-up workloads. A seed gives the same trace on every machine.

use crate::trace::Trace;

/// SplitMix64: small, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// From `low` to `high`, both included.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// One in so many.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Below 1.
    pub fn fraction(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Ranks by Zipf's law.
#[derive(Debug)]
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(n: usize, exponent: f64) -> Self {
        let mut sum = 0.0;
        let weights = (1..=n).map(|rank| {
            sum += (rank as f64).powf(-exponent);
            sum
        });
        Self(weights.collect())
    }

    fn pick(&self, random: &mut Random) -> usize {
        let at = random.fraction() * self.0.last().copied().unwrap_or(0.0);
        self.0.partition_point(|sum| *sum <= at).min(self.0.len() - 1)
    }
}

/// Names of new blocks, and the requests so far: blocks, and how many of them are the prompt.
#[derive(Debug, Default)]
struct Builder {
    names: u64,
    requests: Vec<(Vec<u64>, usize)>,
    blocks: usize,
}

impl Builder {
    fn fresh(&mut self, count: usize) -> Vec<u64> {
        let first = self.names;
        self.names += count as u64;
        (first..self.names).collect()
    }

    /// `answer` blocks follow the prompt; the whole chain is returned.
    fn ask(&mut self, mut prompt: Vec<u64>, answer: usize) -> Vec<u64> {
        let asked = prompt.len();
        prompt.extend(self.fresh(answer));
        self.blocks += prompt.len();
        self.requests.push((prompt.clone(), asked));
        prompt
    }

    fn trace(self, name: &str) -> Trace {
        Trace::new(name, self.requests).expect("chains that only grow are a tree")
    }
}

/// Something that goes on over several requests.
#[derive(Debug)]
struct Session {
    history: Vec<u64>,
    left: usize,
}

/// The names of all workloads.
pub const NAMES: [&str; 6] = ["zipf-scan", "chat", "shared-prompts", "agents", "drift", "mix"];

/// One of [`NAMES`], of about so many blocks.
pub fn generate(name: &str, seed: u64, blocks: usize) -> Option<Trace> {
    let position = NAMES.iter().position(|known| *known == name)?;
    let mut random = Random::new(seed.wrapping_mul(1000) + position as u64);
    let mut builder = Builder::default();
    let random = &mut random;
    match name {
        "zipf-scan" => zipf_scan(&mut builder, random, blocks),
        "chat" => chat(&mut builder, random, blocks),
        "shared-prompts" => shared_prompts(&mut builder, random, blocks),
        "agents" => agents(&mut builder, random, blocks),
        "drift" => drift(&mut builder, random, blocks),
        _ => mix(&mut builder, random, blocks),
    }
    Some(builder.trace(name))
}

/// Questions about documents whose popularity is Zipf's; now and then a batch job reads documents that
/// nobody asks for again.
fn zipf_scan(builder: &mut Builder, random: &mut Random, blocks: usize) {
    let documents: Vec<Vec<u64>> = (0..2000)
        .map(|_| {
            let length = random.between(4, 32);
            builder.fresh(length)
        })
        .collect();
    let zipf = Zipf::new(documents.len(), 0.9);
    while builder.blocks < blocks {
        if random.one_in(400) {
            for _ in 0..60 {
                let length = random.between(8, 40);
                let document = builder.fresh(length);
                builder.ask(document, 1);
            }
        }
        let mut prompt = documents[zipf.pick(random)].clone();
        prompt.extend(builder.fresh(1));
        builder.ask(prompt, random.between(0, 2));
    }
}

/// Conversations: each turn asks for all before it. How soon the next turn comes varies much; half of the
/// conversations have one turn only.
fn chat(builder: &mut Builder, random: &mut Random, blocks: usize) {
    let system = builder.fresh(2);
    // A session waits at a place in a ring of turns to come.
    let mut turns: Vec<Vec<Session>> = Vec::new();
    let mut now = 0;
    while builder.blocks < blocks {
        if turns.len() <= now + 4096 {
            turns.resize_with(now + 8192, Vec::new);
        }
        let mut due = std::mem::take(&mut turns[now]);
        let left = if random.one_in(2) { 1 } else { random.between(2, 12) };
        due.push(Session { history: system.clone(), left });
        for Session { mut history, left } in due {
            let question =
                if history.len() == system.len() { random.between(1, 12) } else { random.between(1, 3) };
            history.extend(builder.fresh(question));
            let history = builder.ask(history, random.between(1, 3));
            if left > 1 {
                // Log-uniform from 4 to 2048 arrivals.
                let wait = 4 << random.below(10);
                turns[now + random.between(wait / 2, wait)].push(Session { history, left: left - 1 });
            }
        }
        now += 1;
    }
}

/// Many applications, each with a system prompt of its own, some with one of a few sets of examples behind
/// it, and then a question that does not come back.
fn shared_prompts(builder: &mut Builder, random: &mut Random, blocks: usize) {
    let systems: Vec<(Vec<u64>, Vec<Vec<u64>>)> = (0..600)
        .map(|_| {
            let length = random.between(4, 48);
            let system = builder.fresh(length);
            let examples = (0..random.between(1, 6))
                .map(|_| {
                    let length = random.between(2, 16);
                    builder.fresh(length)
                })
                .collect();
            (system, examples)
        })
        .collect();
    let zipf = Zipf::new(systems.len(), 0.8);
    while builder.blocks < blocks {
        let (system, examples) = &systems[zipf.pick(random)];
        let mut prompt = system.clone();
        if random.one_in(2) {
            prompt.extend(&examples[random.below(examples.len())]);
        }
        let question = random.between(1, 8);
        prompt.extend(builder.fresh(question));
        builder.ask(prompt, random.between(0, 2));
    }
}

/// Agents: the tools' descriptions, then a loop that sends all so far with each tool's answer; some steps
/// start sub-agents from where they are, some go back and try again. A loop that ended does not come back.
fn agents(builder: &mut Builder, random: &mut Random, blocks: usize) {
    let tools: Vec<Vec<u64>> = (0..12)
        .map(|_| {
            let length = random.between(16, 48);
            builder.fresh(length)
        })
        .collect();
    let mut running: Vec<Session> = Vec::new();
    while builder.blocks < blocks {
        if running.len() < 48 {
            let left = random.between(4, 30);
            running.push(Session { history: tools[random.below(tools.len())].clone(), left });
        }
        agent_step(builder, random, &mut running, 64);
    }
}

fn agent_step(builder: &mut Builder, random: &mut Random, running: &mut Vec<Session>, most: usize) {
    let at = random.below(running.len());
    let Session { mut history, left } = running.swap_remove(at);
    let shortest = history.len();
    let result = random.between(1, 4);
    history.extend(builder.fresh(result));
    let mut history = builder.ask(history, 1);
    if left > 1 {
        if random.one_in(12) && running.len() < most {
            running.push(Session { history: history.clone(), left: random.between(2, 6) });
        }
        if random.one_in(10) {
            history.truncate(shortest);
        }
        running.push(Session { history, left: left - 1 });
    }
}

/// Documents as in `zipf_scan`, but what is popular changes seven times: what was counted is worth nothing.
fn drift(builder: &mut Builder, random: &mut Random, blocks: usize) {
    let zipf = Zipf::new(1000, 1.0);
    for phase in 1..=8 {
        let documents: Vec<Vec<u64>> = (0..1000)
            .map(|_| {
                let length = random.between(4, 24);
                builder.fresh(length)
            })
            .collect();
        while builder.blocks < blocks * phase / 8 {
            let mut prompt = documents[zipf.pick(random)].clone();
            prompt.extend(builder.fresh(1));
            builder.ask(prompt, 1);
        }
    }
}

/// Chat, agents, shared prompts and batch jobs on one engine, one request of each in turn at random.
fn mix(builder: &mut Builder, random: &mut Random, blocks: usize) {
    let mut parts: Vec<std::vec::IntoIter<(Vec<u64>, usize)>> = Vec::new();
    for part in [chat, agents, shared_prompts, zipf_scan] {
        let mut own = Builder { names: builder.names, ..Builder::default() };
        part(&mut own, random, blocks / 4);
        builder.names = own.names;
        parts.push(own.requests.into_iter());
    }
    while !parts.is_empty() {
        let at = random.below(parts.len());
        match parts[at].next() {
            Some(request) => builder.requests.push(request),
            None => drop(parts.swap_remove(at)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_trace_and_another_another() {
        for name in NAMES {
            let trace = generate(name, 1, 5_000).unwrap();
            assert_eq!(trace.requests, generate(name, 1, 5_000).unwrap().requests);
            assert_ne!(trace.requests, generate(name, 2, 5_000).unwrap().requests, "{name}");
            assert!(trace.asked() > 1_000, "{name}");
            assert!(trace.requests.iter().all(|request| request.asked <= request.blocks.len()));
        }
        assert!(generate("no such", 1, 100).is_none());
    }

    #[test]
    fn zipf_prefers_low_ranks() {
        let (zipf, mut random) = (Zipf::new(10, 1.0), Random::new(1));
        let mut counts = [0; 10];
        for _ in 0..10_000 {
            counts[zipf.pick(&mut random)] += 1;
        }
        // 1 / (1 + 1/2 + … + 1/10) of them are the first.
        assert!((3_200..3_640).contains(&counts[0]), "{counts:?}");
        assert!(counts[0] > counts[1] && counts[1] > counts[9]);
    }
}
