//! The store over a disk that fails as it is told.

mod crash;
mod faults;
mod stories;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use super::*;
use crate::{
    device::{
        Device,
        faulty::{Dice, Disk, Faulty},
    },
    format::SpaceId,
    recover::{Found, Report, recover},
};

const SEGMENT: u64 = 96 << 10;
const SLOTS: u32 = 4;
const LANE: u64 = 16 << 10;
const LANES: u64 = 64;

fn key(n: u64) -> RecordKey {
    let mut key = [0x5a; 32];
    key[..8].copy_from_slice(&n.to_le_bytes());
    RecordKey(key)
}

fn number(key: &RecordKey) -> u64 {
    u64::from_le_bytes(*key.0.first_chunk().unwrap())
}

type Known = Arc<(RecordMeta, Vec<u8>)>;

/// Made once: the tests compare them often.
fn record(n: u64) -> Known {
    static KNOWN: Mutex<BTreeMap<u64, Known>> = Mutex::new(BTreeMap::new());
    Arc::clone(KNOWN.lock().unwrap().entry(n).or_insert_with(|| Arc::new(make(n))))
}

fn make(n: u64) -> (RecordMeta, Vec<u8>) {
    let mut dice = Dice::new(n + 1);
    let sectors = 1 + n as usize % 3;
    let mut bytes: Vec<u8> = (0..sectors * SECTOR / 8).flat_map(|_| dice.roll().to_le_bytes()).collect();
    // Some end in the middle of a sector.
    bytes.truncate(bytes.len() - [0, 0, 1, 4095, 1000][n as usize % 5]);
    let meta = RecordMeta {
        key: key(n),
        space: SpaceId([3; 16]),
        hash: [n as u8; 32],
        parent: (n > 0).then(|| key(n - 1)),
        tenant: "default".into(),
        format: "packed".into(),
        bytes: bytes.len() as u64,
        checksum: crate::format::checksum(&bytes),
    };
    (meta, bytes)
}

fn meta(n: u64) -> RecordMeta {
    record(n).0.clone()
}

/// How each put and get ended, and what the caller may count on.
#[derive(Default, Debug)]
struct Seen {
    stored: BTreeMap<u64, u32>,
    put_failed: BTreeMap<u64, PutError>,
    loaded: BTreeSet<u64>,
    get_failed: BTreeMap<u64, GetError>,
    durable: BTreeSet<u64>,
    dropped: Vec<(u64, DropReason)>,
    read_only: bool,
    wrong_bytes: u64,
}

struct World {
    store: Store,
    device: Faulty,
    disk: Arc<Mutex<Disk>>,
    memory: Arc<Memory>,
    seen: Seen,
    hot: BTreeSet<u64>,
    report: Report,
    found: Vec<(u32, Found)>,
    lane: u64,
    puts: u64,
    gets: u64,
    capacity_exceeded: bool,
}

impl World {
    fn on(disk: &Arc<Mutex<Disk>>, seed: u64) -> Self {
        // Every other world opens segments ahead.
        let ahead_segments_min = if seed.is_multiple_of(2) { SLOTS } else { SLOTS + 1 };
        let limits =
            Limits { batch_bytes: 40 << 10, batches_max: 3, ahead_segments_min, ..Limits::default() };
        Self::with(disk, seed, limits)
    }

    fn with(disk: &Arc<Mutex<Disk>>, seed: u64, limits: Limits) -> Self {
        let memory = Arc::new(Memory::owned(LANE * LANES));
        let mut device = Faulty::new(Arc::clone(disk), Arc::clone(&memory), seed);
        let block = device.superblock();
        let mut dice = Dice::new(seed ^ 0xfeed ^ disk.lock().unwrap().operations << 20);
        let random = Box::new(move || {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&dice.roll().to_le_bytes());
            id[8..].copy_from_slice(&dice.roll().to_le_bytes());
            id
        });
        let mut store = Store::new(&[(block, SLOTS)], Arc::clone(&memory), limits, random);
        let mut found = Vec::new();
        let report = recover(&mut device, |slot, segment| {
            match &segment {
                Found::Segment { id, first_sequence, sealed, entries, proved, .. } => {
                    let (id, first_sequence, proved) = (*id, *first_sequence, *proved);
                    store.adopt(0, slot, Some(Life { id, first_sequence, entries, proved }));
                    if !sealed {
                        store.seal_recovered(0, slot, entries);
                    }
                }
                Found::Free(_) => store.adopt(0, slot, None),
                Found::Unreadable(_) => store.adopt_unreadable(0, slot),
            }
            found.push((slot, segment));
        });
        let mut world = Self {
            store,
            device,
            disk: Arc::clone(disk),
            memory,
            seen: Seen::default(),
            hot: BTreeSet::new(),
            report,
            found,
            lane: 0,
            puts: 0,
            gets: 0,
            capacity_exceeded: false,
        };
        // As the tier does: what a crash left open is sealed before anything else.
        if !world.store.is_idle() {
            world.drive();
        }
        world
    }

    fn lane(&mut self, bytes: u64) -> Extent {
        self.lane = (self.lane + 1) % LANES;
        Extent { offset: self.lane * LANE, bytes }
    }

    fn put(&mut self, n: u64, durable: bool) -> Result<(), PutError> {
        let meta = meta(n);
        let extent = self.lane(meta.bytes);
        let bytes = meta.bytes as usize;
        let fill = |lane: &mut [u8]| {
            // What lies behind a record is somebody else's.
            lane.fill(0xee);
            lane[..bytes].copy_from_slice(&record(n).1);
        };
        self.memory.with_mut(extent.padded(), fill).unwrap();
        self.store.put(n, meta, extent, durable)?;
        self.puts += 1;
        Ok(())
    }

    fn save(&mut self, n: u64, durable: bool) {
        if self.put(n, durable).is_ok() {
            self.drive();
        }
    }

    fn get(&mut self, n: u64) -> Result<(), GetError> {
        let bytes = self.store.bytes_of(&key(n)).ok_or(GetError::Missing)?;
        let extent = self.lane(bytes);
        // The token says which lane to look into.
        self.store.get(n << 8 | self.lane, key(n), extent)?;
        self.gets += 1;
        Ok(())
    }

    fn load(&mut self, n: u64) -> bool {
        self.seen.loaded.remove(&n);
        if self.get(n).is_ok() {
            self.drive();
        }
        self.seen.loaded.contains(&n)
    }

    /// Until nothing happens any more.
    fn drive(&mut self) {
        self.drive_but(|_| false);
    }

    /// The same, with operations that take for ever; gives them back.
    fn drive_but(&mut self, mut is_held: impl FnMut(&Op) -> bool) -> Vec<Op> {
        let (mut done, mut held) = (Vec::new(), Vec::new());
        loop {
            while let Some(action) = self.store.next_action() {
                match action {
                    Action::Io { op, .. } if is_held(&op) => held.push(op),
                    action => self.act(action),
                }
            }
            self.capacity_exceeded |= self.disk.lock().unwrap().slots().len() > SLOTS as usize;
            self.device.wait(Some(Duration::ZERO), &mut done);
            if done.is_empty() {
                return held;
            }
            for completion in done.drain(..) {
                self.store.completed(completion);
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Io { op, .. } => self.device.submit(op),
            Action::Stored { token, durable, .. } => {
                *self.seen.stored.entry(token).or_default() += 1;
                if durable {
                    self.seen.durable.insert(token);
                }
            }
            Action::StoreFailed { token, error, .. } => {
                self.seen.put_failed.insert(token, error);
                *self.seen.stored.entry(token).or_default() += 1;
            }
            Action::Loaded { token, key, checksum } => {
                let n = number(&key);
                let extent = Extent { offset: (token & 0xff) * LANE, bytes: meta(n).bytes };
                let bytes = extent.bytes as usize;
                let right = self.memory.with(extent.padded(), |lane| lane[..bytes] == record(n).1).unwrap();
                self.seen.wrong_bytes += u64::from(!right || checksum != meta(n).checksum || token >> 8 != n);
                self.seen.loaded.insert(n);
                self.gets -= 1;
            }
            Action::LoadFailed { token, error, .. } => {
                self.seen.get_failed.insert(token >> 8, error);
                self.gets -= 1;
            }
            Action::Dropped { key, reason } => {
                self.seen.durable.remove(&number(&key));
                self.seen.dropped.push((number(&key), reason));
            }
            Action::WantsRoom { shelf } => {
                let hot = self.hot.clone();
                self.store.evict(shelf, None, |key, _| hot.contains(&number(key)));
            }
            Action::ReadOnly { .. } => self.seen.read_only = true,
        }
    }

    /// What must hold whenever nothing is in flight and the disk did not stop.
    fn check(&self) {
        assert_eq!(self.seen.wrong_bytes, 0, "I1");
        assert_eq!(self.gets, 0, "every get ends");
        let endings: u32 = self.seen.stored.values().sum();
        assert_eq!(u64::from(endings), self.puts, "every put ends once (I2)");
        assert!(self.store.writing.is_empty(), "every put ends: {:?}", self.store.writing);
        assert!(self.store.is_idle(), "{:?}", self.store);
        assert_eq!(self.store.acks, 0);
        assert!(!self.capacity_exceeded);
        let shelf = &self.store.shelves[0];
        assert_eq!((shelf.load, shelf.relocations, shelf.relocation_reads), (0, 0, 0));
        let live: u32 = shelf.segments.iter().map(|segment| segment.live).sum();
        assert_eq!(live as usize, self.store.len());
        let bytes: u64 = shelf.segments.iter().map(|segment| segment.live_bytes).sum();
        assert_eq!(bytes, self.store.index.iter().map(|(_, at)| at.bytes).sum::<u64>());
        for segment in shelf.segments.iter().filter(|segment| segment.state == State::Free) {
            assert_eq!((segment.live, segment.readers, segment.relocating), (0, 0, 0));
        }
    }

    /// Everything that the index has is got; what is got is right, what is not is dropped.
    fn load_all(&mut self) -> usize {
        let keys: Vec<u64> = self.store.index.iter().map(|(key, _)| number(&key)).collect();
        keys.into_iter().filter(|n| self.load(*n)).count()
    }
}
