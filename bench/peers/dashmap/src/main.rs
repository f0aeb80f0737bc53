//! dashmap under the same operations as our presence table: figures beside it.
//!
//! `pillion-peer-dashmap --blocks N --prefix N` prints operations per second, as JSON.

use std::{error::Error, hint::black_box, time::Instant};

use dashmap::DashMap;

/// splitmix64, as the bench's own.
fn roll(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn hashes(count: usize) -> Vec<[u8; 32]> {
    let mut state = 1;
    let mut hash = || {
        let mut bytes = [0; 32];
        bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&roll(&mut state).to_le_bytes()));
        bytes
    };
    (0..count).map(|_| hash()).collect()
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| -> Result<usize, Box<dyn Error>> {
        let at = arguments.iter().position(|one| one == name).ok_or(format!("expected {name}"))?;
        Ok(arguments.get(at + 1).ok_or(format!("expected a number after {name}"))?.parse()?)
    };
    let (blocks, prefix) = (value("--blocks")?, value("--prefix")?);
    let hashes = hashes(blocks);
    let map: DashMap<[u8; 32], u8> = DashMap::with_capacity(blocks);
    let per_second = |began: Instant| blocks as f64 / began.elapsed().as_secs_f64();

    let began = Instant::now();
    for hash in &hashes {
        map.insert(*hash, 1);
    }
    let publish = per_second(began);

    let (mut state, mut found) = (7, 0);
    let began = Instant::now();
    for _ in 0..blocks / prefix {
        let from = roll(&mut state) as usize % (blocks - prefix);
        let run = &hashes[from..from + prefix];
        found += run.iter().take_while(|hash| map.get(*hash).is_some_and(|tiers| *tiers != 0)).count();
    }
    let lookup = per_second(began);
    black_box(found);

    let began = Instant::now();
    for hash in &hashes {
        map.remove(hash);
    }
    println!("{{\"publish\": {publish}, \"lookup\": {lookup}, \"withdraw\": {}}}", per_second(began));
    Ok(())
}
