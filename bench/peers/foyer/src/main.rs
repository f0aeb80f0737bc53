//! foyer's disk cache under the same load as our SSD tier: a figure beside it.
//!
//! `pillion-peer-foyer read|write --dir DIR --bytes N --depth N --seconds S --total BYTES`

use std::{
    error::Error,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use foyer::{
    BlockEngineConfig, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder, IoEngineConfig,
    UringIoEngineConfig,
};

type Cache = HybridCache<u64, Vec<u8>>;

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|one| one == name).ok_or(format!("expected {name}"))?;
        arguments.get(at + 1).cloned().ok_or(format!("expected a value after {name}"))
    };
    let (bytes, depth): (usize, usize) = (value("--bytes")?.parse()?, value("--depth")?.parse()?);
    let (seconds, total): (f64, usize) = (value("--seconds")?.parse()?, value("--total")?.parse()?);
    let is_read = arguments.first().is_some_and(|way| way == "read");
    let path = PathBuf::from(value("--dir")?).join("foyer");

    let device = FsDeviceBuilder::new(&path).with_capacity(total).with_direct(true).build()?;
    let engine = BlockEngineConfig::new(device)
        .with_block_size(64 << 20)
        .with_flushers(2)
        .with_buffer_pool_size(256 << 20)
        // It drops what comes while more is queued; the load below never queues more than its depth.
        .with_submit_queue_size_threshold(2 * depth * bytes + (64 << 20));
    let cache: Cache = HybridCacheBuilder::new()
        // What is being read fits, twice; none of it is met again in memory.
        .memory((2 * depth * bytes).max(16 << 20))
        .with_shards(1)
        .with_weighter(|_, value: &Vec<u8>| value.len())
        .storage()
        .with_io_engine_config(
            Box::new(UringIoEngineConfig::new().with_io_depth(64)) as Box<dyn IoEngineConfig>
        )
        .with_engine_config(engine)
        .build()
        .await?;

    let (began, cpu_began) = (Instant::now(), cpu_seconds());
    let moved = if is_read {
        read(&cache, depth, (total / bytes) as u64, seconds).await?
    } else {
        write(&cache, depth, bytes, (total / bytes) as u64, seconds).await?
    };
    let (took, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu_began);
    if moved == 0 {
        return Err("nothing was moved: `read` finds what `write` left in the same folder".into());
    }
    println!("{{\"gbps\": {}, \"cpu_s_per_gb\": {}}}", moved as f64 / took / 1e9, cpu / (moved as f64 / 1e9));
    Ok(())
}

/// Bytes that reached the disk. Keys rise, so that a later run of `read` finds the last ones.
async fn write(
    cache: &Cache,
    depth: usize,
    bytes: usize,
    keys: u64,
    seconds: f64,
) -> Result<u64, Box<dyn Error>> {
    let record: Vec<u8> =
        (0..bytes).map(|at| (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) as u8).collect();
    let (began, before) = (Instant::now(), cache.statistics().disk_write_bytes() as u64);
    let (mut given, mut key) = (0, 0);
    while began.elapsed().as_secs_f64() < seconds {
        let written = cache.statistics().disk_write_bytes() as u64 - before;
        if given > written + (depth * bytes) as u64 {
            tokio::time::sleep(Duration::from_micros(100)).await;
            continue;
        }
        cache.storage_writer(key % keys).force().insert(record.clone());
        (given, key) = (given + bytes as u64, key + 1);
    }
    cache.close().await?;
    Ok((cache.statistics().disk_write_bytes() as u64 - before).min(given))
}

async fn read(cache: &Cache, depth: usize, keys: u64, seconds: f64) -> Result<u64, Box<dyn Error>> {
    let (began, next) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let mut readers = Vec::new();
    for _ in 0..depth {
        let (cache, next) = (cache.clone(), Arc::clone(&next));
        readers.push(tokio::spawn(async move {
            let mut moved = 0;
            while began.elapsed().as_secs_f64() < seconds {
                let key = next.fetch_add(1, Ordering::Relaxed) % keys;
                match cache.get(&key).await {
                    Ok(Some(entry)) => moved += entry.value().len() as u64,
                    Ok(None) => tokio::task::yield_now().await,
                    Err(error) => return Err(error.to_string()),
                }
            }
            Ok(moved)
        }));
    }
    let mut moved = 0;
    for reader in readers {
        moved += reader.await??;
    }
    Ok(moved)
}
