//! The tier as a service: one thread owns the store, one thread per directory does its I/O.

use std::{
    collections::{HashMap, VecDeque},
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{
    Extent, GetError, Memory, OpenError, PutError,
    device::{
        Completion, Device, Op, Registered, Wake, What,
        directory::{Directory, SLOTS_MAX, Use, random},
        threads::Threads,
        uring::Uring,
    },
    format::{Entry, RecordKey, RecordMeta, Superblock},
    recover::{Found, Report, recover},
    store::{Action, Counters, Life, Limits, ShelfView, Store},
};

/// Segments that a directory needs: one to fill, one to empty, one between.
const SEGMENTS_MIN: u64 = 3;
/// Calls that wait for the owner.
const CALLS_MAX: usize = 4096;

/// Which engine does the I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// io_uring, or threads where the kernel refuses it.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// `preadv` and `pwritev`.
    Threads,
}

/// One directory, on a device of its own.
#[derive(Debug, Clone)]
pub struct DirectoryConfig {
    /// Where.
    pub path: PathBuf,
    /// Bytes of segment files, at most.
    pub capacity_bytes: u64,
}

/// What a tier consists of.
#[derive(Debug, Clone)]
pub struct Config {
    /// Striped by load.
    pub directories: Vec<DirectoryConfig>,
    /// Of new directories.
    pub segment_bytes: u64,
    /// Bounds.
    pub limits: Limits,
    /// Which engine.
    pub engine: Engine,
}

/// How a directory started.
#[derive(Debug, Clone)]
pub struct Started {
    /// Its directory's id and segment length.
    pub superblock: Superblock,
    /// The engine that runs.
    pub engine: &'static str,
    /// Why it is not io_uring, where that was tried.
    pub refused: Option<String>,
    /// What of the pool it has registered by now.
    pub registered: Option<Arc<Registered>>,
    /// What recovery met.
    pub report: Report,
}

impl Started {
    /// Whether more of a pool of this length will be registered than is now.
    pub fn is_registering(&self, pool_bytes: u64) -> bool {
        self.registered.as_ref().is_some_and(|it| it.bytes() < pool_bytes && it.refused().is_none())
    }

    /// What of io_uring is not had, and why, as far as that is known by now.
    pub fn shortfall(&self) -> Option<String> {
        let unregistered = || {
            let registered = self.registered.as_ref()?;
            let (error, mib) = (registered.refused()?, registered.bytes() >> 20);
            Some(format!("the kernel takes {mib} MiB of the pool as registered buffers, not more: {error}"))
        };
        self.refused.clone().or_else(unregistered)
    }
}

/// An engine over a directory, as asked. The thread that calls this is the one that may use it.
///
/// # Errors
/// The engine was asked for by name and cannot be had, or threads cannot be started.
pub fn engine(
    directory: Directory,
    memory: &Arc<Memory>,
    wanted: Engine,
) -> io::Result<(Box<dyn Device>, Option<String>)> {
    let (directory, refused) = match wanted {
        Engine::Threads => (directory, None),
        Engine::Auto | Engine::Uring => match Uring::new(directory, memory) {
            Ok(ring) => return Ok((Box::new(ring), None)),
            Err((_, error)) if wanted == Engine::Uring => return Err(error),
            Err((directory, error)) => (directory, Some(format!("io_uring is refused: {error}"))),
        },
    };
    Ok((Box::new(Threads::new(directory, memory)?), refused))
}

enum Call {
    Put { token: u64, meta: Box<RecordMeta>, extent: Extent, durable: bool },
    Get { token: u64, key: RecordKey, extent: Extent },
    Remove(RecordKey),
    Look,
    Close,
}

/// A tier at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// The directories, in their order.
    pub shelves: Vec<ShelfView>,
    /// Counts since the start, of all of them.
    pub counters: Counters,
}

enum Message {
    Call(Call),
    Done(Vec<Completion>),
    Found(usize, u32, Found),
    Started(usize, Result<(Started, Arc<dyn Wake>), String>),
}

/// Decides about one record of a segment that is evicted; told whether it was read since it was written.
pub type Keep = Box<dyn FnMut(&RecordKey, bool) -> bool + Send>;

/// What the owner calls. All of it runs on the owner's thread.
pub struct Hooks {
    /// Outcomes and drops, one [`Action`] each; never operations.
    pub tell: Box<dyn FnMut(Action) + Send>,
    /// Whether a record is to be kept.
    pub keep: Keep,
}

/// A running tier. Dropping it ends what is in flight and seals what is open.
#[derive(Debug)]
pub struct Tier {
    calls: Sender<Message>,
    waiting: Arc<AtomicUsize>,
    seen: Arc<Mutex<View>>,
    owner: Option<JoinHandle<()>>,
}

impl Tier {
    /// Opens the directories, recovers them (each record that is there goes through `recovered`) and starts.
    ///
    /// # Errors
    /// A directory that cannot be used; nothing runs then.
    pub fn start(
        config: &Config,
        memory: &Arc<Memory>,
        hooks: Hooks,
        mut recovered: impl FnMut(&Entry),
    ) -> Result<(Self, Vec<Started>), OpenError> {
        let mut directories = Vec::new();
        let mut shapes = Vec::new();
        for one in &config.directories {
            let directory = Directory::open(&one.path, Use::Own { segment_bytes: config.segment_bytes })?;
            let block = directory.superblock();
            let slots = one.capacity_bytes / block.segment_bytes;
            if !(SEGMENTS_MIN..=u64::from(SLOTS_MAX)).contains(&slots) {
                let expected =
                    format!("{SEGMENTS_MIN} to {SLOTS_MAX} segments of {} bytes", block.segment_bytes);
                return Err(OpenError::Setting { what: "capacity", expected, got: one.capacity_bytes });
            }
            shapes.push((block, slots as u32));
            directories.push((one.path.clone(), directory));
        }
        // Nothing is removed before all of them can be used.
        for ((_, directory), (_, slots)) in directories.iter_mut().zip(&shapes) {
            directory.shrink(*slots)?;
        }
        let draw = Box::new(|| random().expect("the kernel has random bytes"));
        let mut store = Store::new(&shapes, Arc::clone(memory), config.limits, draw);
        let (calls, messages) = channel();
        let mut ports = Vec::new();
        for (shelf, (path, directory)) in directories.into_iter().enumerate() {
            let port = Port::start(shelf, directory, Arc::clone(memory), config, calls.clone());
            ports.push((port.map_err(|source| cannot_start(&path, source))?, path));
        }
        let started = await_recovery(&mut store, &messages, &mut ports, &mut recovered)?;
        let waiting = Arc::new(AtomicUsize::new(0));
        let ports = ports.into_iter().map(|(port, _)| port).collect();
        let seen = Arc::new(Mutex::new(view(&store)));
        let (waits, sees) = (Arc::clone(&waiting), Arc::clone(&seen));
        let owner = Owner {
            store,
            ports,
            messages,
            hooks,
            waiting: waits,
            seen: sees,
            ended: VecDeque::new(),
            is_closing: false,
        };
        let owner = thread::Builder::new().name("pillion-ssd".into()).spawn(move || owner.run());
        let owner = owner.map_err(|source| cannot_start(&config.directories[0].path, source))?;
        Ok((Self { calls, waiting, seen, owner: Some(owner) }, started))
    }

    /// Stores a record from its extent of the pool; see [`Store::put`]. The ending goes to `tell`.
    ///
    /// # Errors
    /// [`PutError::Busy`]: too many calls wait; nothing follows.
    pub fn put(&self, token: u64, meta: RecordMeta, extent: Extent, durable: bool) -> Result<(), PutError> {
        self.call(Call::Put { token, meta: Box::new(meta), extent, durable }).ok_or(PutError::Busy)
    }

    /// Reads a record into its extent of the pool; see [`Store::get`]. The ending goes to `tell`.
    ///
    /// # Errors
    /// [`GetError::Busy`]: too many calls wait; nothing follows.
    pub fn get(&self, token: u64, key: RecordKey, extent: Extent) -> Result<(), GetError> {
        self.call(Call::Get { token, key, extent }).ok_or(GetError::Busy)
    }

    /// Forgets a record. `false`: too many calls wait.
    #[must_use]
    pub fn remove(&self, key: RecordKey) -> bool {
        self.call(Call::Remove(key)).is_some()
    }

    /// What was last seen, and has it looked at again: who asks now and then is never far behind.
    pub fn view(&self) -> View {
        let _ = self.call(Call::Look);
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn call(&self, call: Call) -> Option<()> {
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= CALLS_MAX {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        self.calls.send(Message::Call(call)).ok()
    }
}

impl Drop for Tier {
    fn drop(&mut self) {
        let _ = self.calls.send(Message::Call(Call::Close));
        if let Some(owner) = self.owner.take() {
            let _ = owner.join();
        }
    }
}

fn cannot_start(path: &std::path::Path, source: io::Error) -> OpenError {
    OpenError::Io { path: path.to_owned(), doing: "start the I/O of", source }
}

fn await_recovery(
    store: &mut Store,
    messages: &Receiver<Message>,
    ports: &mut [(Port, PathBuf)],
    recovered: &mut impl FnMut(&Entry),
) -> Result<Vec<Started>, OpenError> {
    let mut started: Vec<Option<Started>> = ports.iter().map(|_| None).collect();
    // All of them are heard before an error is told: a thread ends in order only when its waker is known.
    let (mut answers, mut refused) = (0, None);
    while answers < ports.len() {
        match messages.recv() {
            Ok(Message::Found(shelf, slot, found)) => match found {
                Found::Free(_) => store.adopt(shelf, slot, None),
                Found::Unreadable(_) => store.adopt_unreadable(shelf, slot),
                Found::Segment { id, first_sequence, sealed, entries, proved, .. } => {
                    store.adopt(shelf, slot, Some(Life { id, first_sequence, entries: &entries, proved }));
                    if !sealed {
                        store.seal_recovered(shelf, slot, &entries);
                    }
                    entries.iter().for_each(&mut *recovered);
                }
            },
            Ok(Message::Started(shelf, Ok((how, waker)))) => {
                ports[shelf].0.waker = Some(waker);
                started[shelf] = Some(how);
                answers += 1;
            }
            Ok(Message::Started(shelf, Err(why))) => {
                refused = Some(cannot_start(&ports[shelf].1, io::Error::other(why)));
                answers += 1;
            }
            Ok(Message::Call(_) | Message::Done(_)) => {}
            Err(_) => return Err(cannot_start(&ports[0].1, io::Error::other("its thread ended"))),
        }
    }
    match refused {
        Some(error) => Err(error),
        None => Ok(started.into_iter().flatten().collect()),
    }
}

fn view(store: &Store) -> View {
    View { shelves: store.shelves(), counters: store.counters() }
}

struct Owner {
    store: Store,
    ports: Vec<Port>,
    messages: Receiver<Message>,
    hooks: Hooks,
    waiting: Arc<AtomicUsize>,
    seen: Arc<Mutex<View>>,
    /// Ended, and not looked at: to prove a record's bytes takes its time.
    ended: VecDeque<Completion>,
    is_closing: bool,
}

impl Owner {
    fn run(mut self) {
        // What a crash left open is sealed before anything is opened: crash after crash at any moment, there is
        // never more of it than one life left.
        let mut early = Vec::new();
        loop {
            self.act();
            if self.store.is_idle() {
                break;
            }
            match self.messages.recv() {
                Ok(Message::Done(completions)) => {
                    completions.into_iter().for_each(|one| self.store.completed(one));
                }
                Ok(other) => early.push(other),
                Err(_) => return,
            }
        }
        early.into_iter().for_each(|message| self.take(message));
        loop {
            self.act();
            if self.is_closing && self.store.is_idle() {
                // After the last record: what was queued is in it.
                self.store.close();
                self.act();
                if self.store.is_idle() {
                    return;
                }
            }
            if self.ended.is_empty() {
                let Ok(first) = self.messages.recv() else { return };
                self.take(first);
            }
            // All that has come, before anything is sent on: that is what batches are made of.
            while let Ok(next) = self.messages.try_recv() {
                self.take(next);
            }
            // One at a time: who waits for it is told, and what the caller asks for then is on its way to the device
            // while the next one is proved.
            if let Some(one) = self.ended.pop_front() {
                self.store.completed(one);
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Done(completions) => self.ended.extend(completions),
            Message::Call(call) => {
                self.waiting.fetch_sub(1, Ordering::Relaxed);
                self.serve(call);
            }
            Message::Found(..) | Message::Started(..) => {}
        }
    }

    fn serve(&mut self, call: Call) {
        match call {
            Call::Put { token, meta, extent, durable } => {
                let key = meta.key;
                if let Err(error) = self.store.put(token, *meta, extent, durable) {
                    (self.hooks.tell)(Action::StoreFailed { token, key, error });
                }
            }
            Call::Get { token, key, extent } => {
                if let Err(error) = self.store.get(token, key, extent) {
                    (self.hooks.tell)(Action::LoadFailed { token, key, error });
                }
            }
            Call::Remove(key) => {
                self.store.remove(&key);
            }
            Call::Look => *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = view(&self.store),
            Call::Close => self.is_closing = true,
        }
    }

    fn act(&mut self) {
        let mut woken = vec![false; self.ports.len()];
        while let Some(action) = self.store.next_action() {
            match action {
                Action::Io { shelf, op } => {
                    woken[shelf] = true;
                    self.ports[shelf].send(op);
                }
                Action::WantsRoom { shelf } => {
                    self.store.evict(shelf, None, &mut self.hooks.keep);
                }
                told => (self.hooks.tell)(told),
            }
        }
        for (port, _) in self.ports.iter().zip(woken).filter(|(_, woken)| *woken) {
            port.wake();
        }
    }
}

/// A directory's thread, as its owner sees it.
struct Port {
    ops: Option<Sender<Op>>,
    waker: Option<Arc<dyn Wake>>,
    thread: Option<JoinHandle<()>>,
}

impl Port {
    fn start(
        shelf: usize,
        directory: Directory,
        memory: Arc<Memory>,
        config: &Config,
        tell: Sender<Message>,
    ) -> io::Result<Self> {
        let (wanted, depth) = (config.engine, config.limits.depth);
        let (ops, queue) = channel();
        let run = move || {
            let (mut device, refused) = match engine(directory, &memory, wanted) {
                Ok(made) => made,
                Err(error) => {
                    let _ = tell.send(Message::Started(shelf, Err(error.to_string())));
                    return;
                }
            };
            let report = recover(&mut *device, |slot, found| {
                let _ = tell.send(Message::Found(shelf, slot, found));
            });
            let how = Started {
                superblock: device.superblock(),
                engine: device.engine(),
                refused,
                registered: device.registered(),
                report,
            };
            if tell.send(Message::Started(shelf, Ok((how, device.waker())))).is_ok() {
                work(&mut *device, depth, &queue, &tell);
            }
        };
        let thread = thread::Builder::new().name(format!("pillion-ssd-{shelf}")).spawn(run)?;
        Ok(Self { ops: Some(ops), waker: None, thread: Some(thread) })
    }

    fn send(&self, op: Op) {
        if let Some(ops) = &self.ops {
            let _ = ops.send(op);
        }
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake();
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.ops = None;
        self.wake();
        // Without a waker it may sleep: then it is left to end with the process.
        if let Some(thread) = self.thread.take().filter(|_| self.waker.is_some()) {
            let _ = thread.join();
        }
    }
}

/// Who goes next. Reads go before writes: somebody waits for them. As long as reads come, few bytes are written at once: a
/// read would wait in the device behind more. What moves no bytes (syncs, new files) needs no such bound.
#[derive(Debug, Default)]
struct Places {
    depth: usize,
    reads: VecDeque<Op>,
    writes: VecDeque<Op>,
    others: VecDeque<Op>,
    /// What is in flight and no read, by its ticket; of a write its bytes.
    beside: HashMap<u64, Option<u64>>,
    reads_in_flight: usize,
    /// When the last read went or ended.
    read_at: Option<Instant>,
}

/// Bytes of writes in flight, beside reads; a write of more goes alone.
const BESIDE_READS: u64 = 2 << 20;
/// So long after a read the next one is to be expected.
const READS_PAUSE: Duration = Duration::from_millis(10);

impl Places {
    fn push(&mut self, op: Op) {
        match op.what {
            What::Read => self.reads.push_back(op),
            What::Write => self.writes.push_back(op),
            What::Sync | What::Prepare => self.others.push_back(op),
        }
    }

    fn in_flight(&self) -> usize {
        self.reads_in_flight + self.beside.len()
    }

    fn writes_in_flight(&self) -> usize {
        self.beside.values().flatten().count()
    }

    fn next(&mut self, now: Instant) -> Option<Op> {
        let free = self.depth.checked_sub(self.in_flight()).filter(|free| *free > 0)?;
        let is_reading = !self.reads.is_empty()
            || self.reads_in_flight > 0
            || self.read_at.is_some_and(|at| now.duration_since(at) < READS_PAUSE);
        let is_alone = self.writes_in_flight() == 0;
        let bytes: u64 = self.beside.values().flatten().sum();
        let may_write = self.writes.front().is_some_and(|write| {
            let is_short = is_alone || bytes + write.bytes() <= BESIDE_READS;
            self.writes_in_flight() < self.depth.div_ceil(2) && (is_short || !is_reading)
        });
        // However many reads there are, the others go on. However few, one place is left for a read.
        let is_owed = may_write && is_alone && self.depth > 1;
        let others = self.others.pop_front_if(|_| free > 1 || self.beside.is_empty());
        let read = || self.reads.pop_front_if(|_| free > usize::from(is_owed));
        let op = others.or_else(read).or_else(|| self.writes.pop_front_if(|_| may_write))?;
        if op.what == What::Read {
            self.reads_in_flight += 1;
            self.read_at = Some(now);
        } else {
            self.beside.insert(op.ticket, (op.what == What::Write).then(|| op.bytes()));
        }
        Some(op)
    }

    fn ended(&mut self, ticket: u64, now: Instant) {
        if self.beside.remove(&ticket).is_none() {
            self.reads_in_flight -= 1;
            self.read_at = Some(now);
        }
    }
}

fn work(device: &mut dyn Device, depth: usize, queue: &Receiver<Op>, tell: &Sender<Message>) {
    let mut places = Places { depth: device.depth().min(depth).max(1), ..Places::default() };
    let mut done: Vec<Completion> = Vec::new();
    loop {
        let is_over = loop {
            match queue.try_recv() {
                Ok(op) => places.push(op),
                Err(TryRecvError::Empty) => break false,
                Err(TryRecvError::Disconnected) => break true,
            }
        };
        let now = Instant::now();
        done.iter().for_each(|one| places.ended(one.ticket, now));
        let mut has_more = false;
        while let Some(op) = places.next(now) {
            device.submit(op);
            has_more = true;
        }
        if !done.is_empty() {
            // The device first: it would rest while others are woken.
            if has_more {
                device.start();
            }
            if tell.send(Message::Done(std::mem::take(&mut done))).is_err() {
                // Nobody listens: end what is in flight, take no more.
                places.reads.clear();
                places.writes.clear();
                places.others.clear();
            }
        }
        if is_over && places.in_flight() == 0 {
            return;
        }
        device.wait(None, &mut done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Part;

    fn op(ticket: u64, what: What) -> Op {
        of_bytes(ticket, what, BESIDE_READS)
    }

    fn of_bytes(ticket: u64, what: What, bytes: u64) -> Op {
        Op { ticket, slot: 0, what, at: 0, parts: vec![Part::Pool(Extent { offset: 0, bytes })] }
    }

    #[test]
    fn writes_go_on_beside_reads_and_have_half_of_the_places_when_no_reads_come() {
        let mut places = Places { depth: 16, ..Places::default() };
        let mut now = Instant::now();
        let taken = |places: &mut Places, now| -> Vec<u64> {
            std::iter::from_fn(|| places.next(now)).map(|op| op.ticket).collect()
        };
        (0..1000).for_each(|ticket| places.push(op(ticket, What::Read)));
        let mut flying = VecDeque::from(taken(&mut places, now));
        assert_eq!(flying.len(), 16, "reads alone take all places");
        (1000..1100).for_each(|ticket| places.push(op(ticket, What::Write)));
        for _ in 0..400 {
            places.ended(flying.pop_front().unwrap(), now);
            flying.extend(taken(&mut places, now));
            assert_eq!((flying.len(), places.in_flight()), (16, 16));
            assert!(places.writes_in_flight() <= 1, "reads still first");
        }
        assert!(places.writes.len() < 80, "writes go on: {} wait", places.writes.len());
        places.reads.clear();
        while let Some(ticket) = flying.pop_front() {
            places.ended(ticket, now);
        }
        flying.extend(taken(&mut places, now));
        assert_eq!(flying.len(), 1, "the next read may be about to come");
        now += READS_PAUSE;
        flying.extend(taken(&mut places, now));
        assert_eq!((flying.len(), places.writes_in_flight()), (8, 8), "half, where none came");
        places.push(op(2000, What::Read));
        assert_eq!(taken(&mut places, now), [2000], "it need not wait for any of them to end");
    }

    #[test]
    fn beside_reads_short_writes_go_together_and_a_long_one_alone() {
        let now = Instant::now();
        let begun = |bytes: &[u64]| {
            let mut places = Places { depth: 16, ..Places::default() };
            places.push(op(0, What::Read));
            (1..).zip(bytes).for_each(|(ticket, bytes)| places.push(of_bytes(ticket, What::Write, *bytes)));
            let writes = std::iter::from_fn(|| places.next(now)).map(|op| op.ticket).skip(1).collect();
            (writes, places)
        };
        let (writes, mut places): (Vec<u64>, _) = begun(&[4096, BESIDE_READS - 8192, 4096, 4096]);
        assert_eq!(writes, [1, 2, 3]);
        places.ended(2, now);
        assert_eq!(places.next(now).map(|op| op.ticket), Some(4));
        assert_eq!(begun(&[BESIDE_READS + 4096, 4096]).0, [1]);
        assert_eq!(begun(&[4096, BESIDE_READS]).0, [1]);
    }

    #[test]
    fn a_sync_goes_on_however_many_reads_there_are_and_takes_no_place_of_a_write() {
        for depth in 1..4 {
            let mut places = Places { depth, ..Places::default() };
            let now = Instant::now();
            (0..1000).for_each(|ticket| places.push(op(ticket, What::Read)));
            let mut flying: VecDeque<u64> =
                std::iter::from_fn(|| places.next(now)).map(|op| op.ticket).collect();
            (2000..2003).for_each(|ticket| places.push(op(ticket, What::Sync)));
            (3000..3003).for_each(|ticket| places.push(op(ticket, What::Write)));
            let mut beside = Vec::new();
            for _ in 0..100 {
                places.ended(flying.pop_front().unwrap(), now);
                while let Some(next) = places.next(now) {
                    beside.extend((next.what != What::Read).then_some(next.what));
                    flying.push_back(next.ticket);
                }
                assert_eq!(flying.len(), depth, "no place is empty");
            }
            assert_eq!(beside.iter().filter(|what| **what == What::Sync).count(), 3, "depth {depth}");
            let writes = beside.iter().filter(|what| **what == What::Write).count();
            assert_eq!(writes, if depth == 1 { 0 } else { 3 }, "one place only is the reads'");
        }
    }
}
