//! A tier with a pool of lanes, as its callers here use it.
#![expect(unsafe_code, reason = "the pool is memory that the kernel reads and writes")]

use std::{
    path::{Path, PathBuf},
    ptr::NonNull,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    time::Instant,
};

use pillion_cuda::{HostPool, PoolOptions};
use pillion_ssd::{
    Extent, Memory, OpenError,
    format::{Entry, RecordKey, RecordMeta, SpaceId},
    store::{Action, Limits},
    tier::{Config, DirectoryConfig, Engine, Hooks, Started, Tier},
};

/// What goes wrong in these programs is told and ends them.
pub(crate) type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Lanes of one length, in a pool as the product has one: huge pages where enough are set aside. An operation has a
/// lane for itself.
pub(crate) struct Pool {
    pub(crate) memory: Arc<Memory>,
    pub(crate) has_huge_pages: bool,
    base: NonNull<u8>,
    lane_bytes: u64,
    lanes: u64,
}

impl Pool {
    pub(crate) fn new(lane_bytes: u64, lanes: u64) -> Outcome<Self> {
        let bytes = (lane_bytes * lanes).next_multiple_of(2 << 20);
        let pool = HostPool::with(PoolOptions { bytes, touch: true, ..PoolOptions::default() })?;
        let (has_huge_pages, base) = (pool.has_huge_pages(), NonNull::new(pool.address()));
        let base = base.ok_or("the pool has no address")?;
        // SAFETY: the mapping lives in the `Arc` and is touched through this pool only; who uses a lane has it
        // for itself until the operation's outcome is told (the contract of `slice` and `slice_mut`).
        let memory = unsafe { Memory::from_raw(base, bytes, Arc::new(pool)) };
        Ok(Self { memory: Arc::new(memory), has_huge_pages, base, lane_bytes, lanes })
    }

    pub(crate) fn lane(&self, lane: u64, bytes: u64) -> Extent {
        assert!(lane < self.lanes && bytes <= self.lane_bytes);
        Extent { offset: lane * self.lane_bytes, bytes }
    }

    /// A lane's bytes. No get may be under way into it.
    pub(crate) fn slice(&self, extent: Extent) -> &[u8] {
        assert!(self.memory.holds(extent));
        // SAFETY: inside the buffer; the caller waited for the end of what wrote it.
        unsafe {
            std::slice::from_raw_parts(self.base.as_ptr().add(extent.offset as usize), extent.bytes as usize)
        }
    }

    /// The same, to be filled. Nothing may be under way with it.
    pub(crate) fn slice_mut(&mut self, extent: Extent) -> &mut [u8] {
        assert!(self.memory.holds(extent));
        // SAFETY: inside the buffer; the caller waited for the end of what used it.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.as_ptr().add(extent.offset as usize),
                extent.bytes as usize,
            )
        }
    }
}

/// splitmix64: reproducible, and good enough to choose by.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound
    }
    pub(crate) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// Fills with what belongs to a seed.
pub(crate) fn fill(seed: u64, into: &mut [u8]) {
    let mut dice = Dice::new(seed);
    for word in into.chunks_exact_mut(8) {
        word.copy_from_slice(&dice.roll().to_le_bytes());
    }
}

pub(crate) fn key(number: u64) -> RecordKey {
    let mut key = [0x70; 32];
    key[..8].copy_from_slice(&number.to_le_bytes());
    RecordKey(key)
}

pub(crate) fn number(key: &RecordKey) -> u64 {
    key.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

pub(crate) fn meta(number: u64, bytes: u64, checksum: u64) -> RecordMeta {
    RecordMeta {
        key: key(number),
        space: SpaceId([7; 16]),
        hash: [1; 32],
        parent: None,
        tenant: "default".into(),
        format: "bench".into(),
        bytes,
        checksum,
    }
}

/// Where a tier lives and how it is cut.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) capacity_bytes: u64,
    pub(crate) segment_bytes: u64,
    pub(crate) engine: Engine,
    pub(crate) limits: Limits,
}

impl Shape {
    pub(crate) fn one(path: &Path, capacity_bytes: u64, segment_bytes: u64, engine: Engine) -> Self {
        Self::of(vec![path.to_owned()], capacity_bytes, segment_bytes, engine)
    }

    pub(crate) fn of(paths: Vec<PathBuf>, capacity_bytes: u64, segment_bytes: u64, engine: Engine) -> Self {
        Self { paths, capacity_bytes, segment_bytes, engine, limits: Limits::default() }
    }
}

/// Starts a tier; `recovered` gets what is there.
pub(crate) fn start(
    shape: &Shape,
    memory: &Arc<Memory>,
    hooks: Hooks,
    recovered: impl FnMut(&Entry),
) -> Result<(Tier, Vec<Started>), OpenError> {
    let directory =
        |path: &PathBuf| DirectoryConfig { path: path.clone(), capacity_bytes: shape.capacity_bytes };
    let config = Config {
        directories: shape.paths.iter().map(directory).collect(),
        segment_bytes: shape.segment_bytes,
        limits: shape.limits,
        engine: shape.engine,
    };
    Tier::start(&config, memory, hooks, recovered)
}

/// Hooks that send on what they are told, with the time.
pub(crate) fn told() -> (Hooks, Receiver<(Action, Instant)>) {
    let (tell, told) = channel();
    let tell = move |action| tell.send((action, Instant::now())).unwrap_or(());
    (Hooks { tell: Box::new(tell), keep: Box::new(|_, _| false) }, told)
}

/// A directory of its own below another one, removed at the end.
#[derive(Debug)]
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(below: &Path, name: &str) -> Outcome<Self> {
        let path = below.join(format!("pillion-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }
    pub(crate) fn sub(&self, name: &str) -> Outcome<PathBuf> {
        let path = self.0.join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// CPU seconds of this process so far, and its highest RSS in bytes.
pub(crate) fn usage() -> (f64, u64) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may have spaces: fields 14 and 15 are ticks of 10 ms.
    let ticks = |at: usize| -> f64 {
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        fields.clone().nth(at).and_then(|text| text.parse().ok()).unwrap_or(0.0)
    };
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    let peak: u64 = peak.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0);
    ((ticks(11) + ticks(12)) / 100.0, peak << 10)
}
