//! What lies on the SSD, and what is on its way there or back.
//!
//! The storage engine (`pillion-ssd`) knows where a record lies; this index knows whose it is and whether it may
//! be found. Both hear of everything in the same order.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use pillion_shm::presence::IndexKey;

use crate::{
    event::CopyItem,
    ids::NamespaceId,
    jobs::JobKey,
    key::{BlockKey, Tenant},
    store::{KeyMap, RecordId},
};

/// Recovered records that become visible at once: the rest follows with the next ticks, so that a large
/// directory does not hold up everybody else.
const REVEALED_AT_ONCE: usize = 16_384;

/// When a record goes to the SSD, and what its save's acknowledgement means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// In the background, after the save was acknowledged.
    #[default]
    WriteBack,
    /// A save is acknowledged when its blocks are on stable storage.
    WriteThrough,
    /// As `WriteBack`; and what is on the SSD is the first to leave the host pool until it is asked for.
    WriteAround,
    /// Nothing is written; what is there is read.
    ReadOnly,
}

/// Bounds of the SSD's part (I8).
#[derive(Debug, Clone)]
pub struct SsdLimits {
    /// What is written when, unless an engine asks for something else; read-only stays that.
    pub mode: CacheMode,
    /// How long a lease waits for records to be read before it is granted without the rest.
    pub wait_ns: u64,
    /// A lease covers what will have been read within this time, too, as fast as the disk has been; its load copies
    /// what has come. A load to which nothing comes for this long fails. 0: leases cover what is in the pool.
    pub ahead_ns: u64,
    /// Records that may be known.
    pub records_max: usize,
    /// Records that may wait to be written.
    pub offers_max: usize,
    /// Records that are being written, at most, and their bytes.
    pub puts_max: usize,
    /// See `puts_max`.
    pub put_bytes_max: u64,
    /// Records that are being read, at most, and their bytes.
    pub gets_max: usize,
    /// See `gets_max`.
    pub get_bytes_max: u64,
}

impl SsdLimits {
    /// What suits a pool of this size.
    pub fn for_pool(pool_bytes: u64) -> Self {
        Self {
            mode: CacheMode::default(),
            wait_ns: 200_000_000,
            ahead_ns: 1_000_000_000,
            records_max: 1 << 20,
            offers_max: 1 << 20,
            puts_max: 128,
            put_bytes_max: (pool_bytes / 8).min(256 << 20),
            gets_max: 256,
            get_bytes_max: (pool_bytes / 4).min(512 << 20),
        }
    }
}

/// A record as the SSD keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SsdRecord {
    /// The block key's bytes: whoever forms the key anew must get the same ones.
    pub key: [u8; 32],
    pub space: NamespaceId,
    /// The engine's hash.
    pub hash: [u8; 32],
    pub parent: Option<[u8; 32]>,
    pub tenant: Arc<str>,
    pub format: Arc<str>,
    pub bytes: u64,
    pub checksum: u64,
}

/// How a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutEnding {
    /// It can be read; it is on stable storage if that was asked for.
    Stored,
    /// It cannot.
    Failed,
}

/// How a read ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GetEnding {
    /// The bytes are in the pool and proved; their checksum.
    Loaded(u64),
    /// Its bytes were others than had been written. It is there no more.
    Corrupt,
    /// It could not be read, or was not there. It is there no more.
    Gone,
    /// Not now.
    Busy,
}

/// A visible record.
#[derive(Debug, Clone)]
pub(crate) struct OnSsd {
    pub(crate) space: NamespaceId,
    pub(crate) hash: [u8; 32],
    pub(crate) index: IndexKey,
    pub(crate) tenant: Arc<str>,
    pub(crate) format: Arc<str>,
    pub(crate) bytes: u64,
    pub(crate) parent: Option<BlockKey>,
}

/// A record that is to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Offer {
    pub(crate) key: BlockKey,
    pub(crate) mode: CacheMode,
    /// The job that waits for it; the record is pinned until then.
    pub(crate) waiting: Option<(JobKey, RecordId)>,
}

/// A write that is under way; its record is pinned.
#[derive(Debug)]
pub(crate) struct Put {
    pub(crate) key: BlockKey,
    pub(crate) record: RecordId,
    pub(crate) bytes: u64,
    pub(crate) mode: CacheMode,
    pub(crate) job: Option<JobKey>,
}

/// A read that was decided on: its record has its place in the pool.
#[derive(Debug)]
pub(crate) struct Fetch {
    pub(crate) record: RecordId,
    pub(crate) bytes: u64,
    /// Under way, or in the queue.
    pub(crate) token: Option<u64>,
    /// Bytes that were ever decided on before it has come.
    pub(crate) end: u64,
    /// Places of waiting leases: wait, run, slot.
    pub(crate) waiters: Vec<(u64, usize, usize)>,
    /// Loads that go on when it has come.
    pub(crate) loads: Vec<Awaiting>,
}

/// A block of a load that waits for its record.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Awaiting {
    pub(crate) job: JobKey,
    /// Ids may come again.
    pub(crate) serial: u64,
    /// Its checksum is known when the record has come.
    pub(crate) item: CopyItem,
}

/// How fast reads come, while there are some.
#[derive(Debug, Default)]
struct Pace {
    /// Bytes per second; 0: not known yet.
    rate: u64,
    /// Since the rate was last adjusted.
    bytes: u64,
    ns: u64,
}

impl Pace {
    /// Reads that end together are one sample.
    const SAMPLE_NS: u64 = 2_000_000;

    fn came(&mut self, bytes: u64, after_ns: u64) {
        self.bytes += bytes;
        self.ns += after_ns;
        if self.ns < Self::SAMPLE_NS {
            return;
        }
        let sample = u128::from(self.bytes) * 1_000_000_000 / u128::from(self.ns);
        let sample = u64::try_from(sample).unwrap_or(u64::MAX);
        self.rate = if self.rate == 0 { sample } else { self.rate / 4 * 3 + sample / 4 };
        (self.bytes, self.ns) = (0, 0);
    }

    /// Whether so much comes within a time.
    fn brings(&self, bytes: u64, within_ns: u64) -> bool {
        u128::from(self.rate) * u128::from(within_ns) >= u128::from(bytes) * 1_000_000_000 && self.rate > 0
    }
}

#[derive(Debug)]
pub(crate) struct Ssd {
    pub(crate) limits: SsdLimits,
    index: KeyMap<OnSsd>,
    /// Recovered, until their tenant is known: by its name.
    hidden: HashMap<Arc<str>, BTreeMap<[u8; 32], SsdRecord>>,
    hidden_count: usize,
    /// To be written, oldest first.
    pub(crate) offers: VecDeque<Offer>,
    pub(crate) puts: HashMap<u64, Put>,
    pub(crate) put_bytes: u64,
    pub(crate) fetches: KeyMap<Fetch>,
    /// Fetches that have not been begun.
    pub(crate) queue: VecDeque<BlockKey>,
    pub(crate) gets: HashMap<u64, BlockKey>,
    pub(crate) get_bytes: u64,
    /// When a read last ended, or was begun while none was under way.
    moved_ns: u64,
    /// Bytes of all fetches ever, and of those that have ended.
    fetched: u64,
    ended: u64,
    pace: Pace,
    next_token: u64,
}

impl Ssd {
    pub(crate) fn new(limits: SsdLimits) -> Self {
        Self {
            limits,
            index: KeyMap::default(),
            hidden: HashMap::new(),
            hidden_count: 0,
            offers: VecDeque::new(),
            puts: HashMap::new(),
            put_bytes: 0,
            fetches: KeyMap::default(),
            queue: VecDeque::new(),
            gets: HashMap::new(),
            get_bytes: 0,
            moved_ns: 0,
            fetched: 0,
            ended: 0,
            pace: Pace::default(),
            next_token: 0,
        }
    }

    /// How an engine's blocks are kept that asked for this.
    pub(crate) fn mode(&self, asked: Option<CacheMode>) -> CacheMode {
        match self.limits.mode {
            CacheMode::ReadOnly => CacheMode::ReadOnly,
            mode => asked.unwrap_or(mode),
        }
    }

    pub(crate) fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Records that can be found, and those that wait for their tenant.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.index.len(), self.hidden_count)
    }

    pub(crate) fn find(&self, key: &BlockKey) -> Option<&OnSsd> {
        self.index.get(key)
    }

    pub(crate) fn find_bytes(&self, key: &[u8; 32]) -> Option<(&BlockKey, &OnSsd)> {
        self.index.get_key_value(key)
    }

    pub(crate) fn contains(&self, key: &BlockKey) -> bool {
        self.index.contains_key(key)
    }

    /// False: there is no room for one more.
    pub(crate) fn insert(&mut self, key: BlockKey, record: OnSsd) -> bool {
        let room = self.index.len() + self.hidden_count < self.limits.records_max;
        if room || self.index.contains_key(&key) {
            self.index.insert(key, record);
            return true;
        }
        false
    }

    /// Takes a record out, by its key's bytes: it may not have been visible yet.
    pub(crate) fn forget(&mut self, key: &[u8; 32]) -> Option<(BlockKey, OnSsd)> {
        for records in self.hidden.values_mut() {
            self.hidden_count -= usize::from(records.remove(key).is_some());
        }
        self.index.remove_entry(key)
    }

    /// Keeps a recovered record until its tenant comes. False: there is no room for one more.
    pub(crate) fn hide(&mut self, record: SsdRecord) -> bool {
        if self.index.len() + self.hidden_count >= self.limits.records_max {
            return false;
        }
        let tenant = self.hidden.entry(Arc::clone(&record.tenant)).or_default();
        self.hidden_count += usize::from(tenant.insert(record.key, record).is_none());
        true
    }

    /// Some recovered records of a tenant that is known by now.
    pub(crate) fn reveal(&mut self, tenant: &Tenant) -> Vec<SsdRecord> {
        let Some(records) = self.hidden.get_mut(&tenant.name) else { return Vec::new() };
        let some: Vec<_> = std::iter::from_fn(|| records.pop_first().map(|(_, record)| record))
            .take(REVEALED_AT_ONCE)
            .collect();
        if records.is_empty() {
            self.hidden.remove(&tenant.name);
        }
        self.hidden_count -= some.len();
        some
    }

    pub(crate) fn hides(&self, tenant: &str) -> bool {
        self.hidden.contains_key(tenant)
    }

    /// Nothing is on its way.
    pub(crate) fn is_idle(&self) -> bool {
        self.offers.is_empty() && self.puts.is_empty() && self.fetches.is_empty()
    }

    /// Decides on a read.
    pub(crate) fn queue(&mut self, key: BlockKey, record: RecordId, bytes: u64) -> &mut Fetch {
        self.fetched += bytes;
        self.queue.push_back(key);
        let (token, end) = (None, self.fetched);
        let fetch = Fetch { record, bytes, token, end, waiters: Vec::new(), loads: Vec::new() };
        self.fetches.entry(key).insert_entry(fetch).into_mut()
    }

    /// A read begins. Its token.
    pub(crate) fn begin(&mut self, key: BlockKey, now_ns: u64) -> u64 {
        let token = self.token();
        if self.gets.is_empty() {
            self.moved_ns = now_ns;
        }
        if let Some(fetch) = self.fetches.get_mut(&key) {
            fetch.token = Some(token);
            self.get_bytes += fetch.bytes;
        }
        self.gets.insert(token, key);
        token
    }

    /// A read has ended, well or not.
    pub(crate) fn end(&mut self, token: u64, well: bool, now_ns: u64) -> Option<(BlockKey, Fetch)> {
        let key = self.gets.remove(&token)?;
        let fetch = self.fetches.remove(&key)?;
        self.get_bytes -= fetch.bytes;
        self.ended += fetch.bytes;
        let after_ns = now_ns.saturating_sub(self.moved_ns);
        self.moved_ns = now_ns;
        self.pace.came(if well { fetch.bytes } else { 0 }, after_ns);
        Some((key, fetch))
    }

    /// Nobody wants a read any more that has not begun.
    pub(crate) fn give_up(&mut self, key: &BlockKey) -> Option<Fetch> {
        let fetch = self.fetches.remove(key)?;
        self.ended += fetch.bytes;
        Some(fetch)
    }

    /// Whether a fetch will have come before one waits too long for it, as far as can be known.
    pub(crate) fn will_bring(&self, end: u64, now_ns: u64) -> bool {
        let bytes = end.saturating_sub(self.ended);
        !self.is_stalled(self.limits.wait_ns, now_ns) && self.pace.brings(bytes, self.limits.ahead_ns)
    }

    /// Whether reads are under way and none has ended for so long.
    pub(crate) fn is_stalled(&self, for_ns: u64, now_ns: u64) -> bool {
        !self.gets.is_empty() && now_ns.saturating_sub(self.moved_ns) > for_ns
    }

    /// How long a lease may wait now. On a disk that has brought nothing for as long as one may wait, nobody waits: each
    /// request would be late for nothing.
    pub(crate) fn patience_ns(&self, now_ns: u64) -> u64 {
        if self.is_stalled(self.limits.wait_ns, now_ns) { 0 } else { self.limits.wait_ns }
    }

    pub(crate) fn may_put(&self, bytes: u64) -> bool {
        let fits = self.put_bytes + bytes <= self.limits.put_bytes_max || self.puts.is_empty();
        fits && self.puts.len() < self.limits.puts_max
    }

    pub(crate) fn may_get(&self, bytes: u64) -> bool {
        let fits = self.get_bytes + bytes <= self.limits.get_bytes_max || self.gets.is_empty();
        fits && self.gets.len() < self.limits.gets_max
    }

    /// Checks what must always hold; for tests.
    #[cfg(any(test, feature = "checked"))]
    pub(crate) fn check(&self) {
        assert_eq!(self.hidden_count, self.hidden.values().map(BTreeMap::len).sum::<usize>());
        assert!(self.index.len() + self.hidden_count <= self.limits.records_max);
        assert_eq!(self.put_bytes, self.puts.values().map(|put| put.bytes).sum::<u64>());
        let begun = || self.fetches.values().filter(|fetch| fetch.token.is_some());
        assert_eq!(self.get_bytes, begun().map(|fetch| fetch.bytes).sum::<u64>());
        assert_eq!(self.gets.len(), begun().count(), "two reads of one record");
        assert!(self.gets.iter().all(|(token, key)| self.fetches[key].token == Some(*token)));
        assert_eq!(self.fetches.len(), self.gets.len() + self.queue.len());
        let left = self.fetches.values().map(|fetch| fetch.bytes).sum::<u64>();
        assert_eq!(self.fetched - self.ended, left);
        assert!(self.puts.len() <= self.limits.puts_max && self.gets.len() <= self.limits.gets_max);
        assert!(self.put_bytes <= self.limits.put_bytes_max || self.puts.len() == 1);
        assert!(self.get_bytes <= self.limits.get_bytes_max || self.gets.len() == 1);
    }
}
