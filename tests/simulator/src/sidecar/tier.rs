//! A sidecar's SSD: the shipped store on a disk that fails as it is told, and what carries calls and outcomes between
//! it and the core, as `sidecar/daemon`'s `ssd.rs` and the tier's threads do.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use pillion_core::{Event, GetEnding, NamespaceId, PutEnding, SsdRecord};
use pillion_ssd::{
    Extent, GetError, Memory, PutError,
    device::{
        Device, What,
        faulty::{Disk, Fault as DiskFault, Faulty},
    },
    format::{Entry, RecordKey, RecordMeta, SpaceId},
    recover::{Found, recover},
    store::{Action, DropReason, Life, Limits, Store},
};

use crate::{
    dice::Dice,
    net::Next,
    plan::{Fault, MS, Sabotage, SsdPlan},
    world::World,
};

const EIO: i32 = 5;

#[derive(Debug)]
enum Call {
    Put { token: u64, meta: RecordMeta, extent: Extent, durable: bool },
    Get { token: u64, key: RecordKey, extent: Extent },
}

/// See the module.
pub(crate) struct Tier {
    pub(super) store: Store,
    device: Faulty,
    calls: VecDeque<Call>,
    /// Where what is being read will lie.
    reading: BTreeMap<u64, Extent>,
    /// Recovery has ended.
    is_ready: bool,
    is_scheduled: bool,
    is_closing: bool,
    told_at: u64,
}

impl std::fmt::Debug for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tier").field("store", &self.store).field("calls", &self.calls.len()).finish()
    }
}

pub(crate) fn disk_of(disk: &Arc<Mutex<Disk>>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tier {
    pub(super) fn new(
        disk: &Arc<Mutex<Disk>>,
        memory: &Arc<Memory>,
        plan: &SsdPlan,
        dice: &mut Dice,
    ) -> Self {
        let device = Faulty::new(Arc::clone(disk), Arc::clone(memory), dice.roll());
        let limits = Limits {
            puts_max: plan.store_puts_max,
            gets_max: plan.in_flight_max,
            batch_bytes: plan.batch_bytes,
            batches_max: 3,
            strikes_max: 3,
            ahead_segments_min: 4,
            ..Limits::default()
        };
        let mut names = dice.fork(dice.clone().roll());
        let random = Box::new(move || {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&names.roll().to_le_bytes());
            id[8..].copy_from_slice(&names.roll().to_le_bytes());
            id
        });
        let store = Store::new(&[(device.superblock(), plan.slots)], Arc::clone(memory), limits, random);
        Self {
            store,
            device,
            calls: VecDeque::new(),
            reading: BTreeMap::new(),
            is_ready: false,
            is_scheduled: false,
            is_closing: false,
            told_at: 0,
        }
    }

    /// Its process is gone: some of what the kernel was told to do is done all the same.
    pub(crate) fn killed(&mut self, dice: &mut Dice) {
        let mut done = Vec::new();
        (0..dice.below(3)).for_each(|_| self.device.wait(Some(Duration::ZERO), &mut done));
    }

    /// Seals what is open. Whether nothing is left to do.
    pub(crate) fn close(&mut self) -> bool {
        if !self.is_ready {
            return true;
        }
        if !self.is_closing && self.calls.is_empty() && self.store.is_idle() {
            self.is_closing = true;
            self.store.close();
        }
        self.is_closing && self.store.is_idle()
    }

    /// Whether nothing is on its way, to the disk or to the core.
    pub(crate) fn is_idle(&self, now: u64) -> bool {
        let is_quiet = self.calls.is_empty() && self.store.is_idle();
        self.is_ready && is_quiet && self.told_at < now
    }

    /// Reads what a crash left, and seals it before anything else: as the tier's threads do. Each record that is found
    /// goes to `each`.
    pub(super) fn recover(&mut self, mut each: impl FnMut(&Entry)) {
        let store = &mut self.store;
        recover(&mut self.device, |slot, found| match found {
            Found::Segment { id, first_sequence, sealed, entries, proved, .. } => {
                store.adopt(0, slot, Some(Life { id, first_sequence, entries: &entries, proved }));
                if !sealed {
                    store.seal_recovered(0, slot, &entries);
                }
                entries.iter().for_each(&mut each);
            }
            Found::Free(_) => store.adopt(0, slot, None),
            Found::Unreadable(_) => store.adopt_unreadable(0, slot),
        });
        self.drive();
        self.is_ready = true;
    }

    /// Until nothing happens any more; what it tells.
    pub(super) fn drive(&mut self) -> Vec<Action> {
        let (mut done, mut told) = (Vec::new(), Vec::new());
        loop {
            told.extend(self.act());
            self.device.wait(Some(Duration::ZERO), &mut done);
            if done.is_empty() {
                return told;
            }
            done.drain(..).for_each(|completion| self.store.completed(completion));
        }
    }

    fn act(&mut self) -> Vec<Action> {
        let mut told = Vec::new();
        while let Some(action) = self.store.next_action() {
            match action {
                Action::Io { op, .. } => self.device.submit(op),
                // Decision 008.
                Action::WantsRoom { shelf } => drop(self.store.evict(shelf, None, |_, was_read| was_read)),
                other => told.push(other),
            }
        }
        told
    }

    fn serve(&mut self, call: Call) -> Option<Event> {
        match call {
            Call::Put { token, meta, extent, durable } => {
                let taken = self.store.put(token, meta, extent, durable);
                taken.is_err().then_some(Event::SsdPutEnded { token, ending: PutEnding::Failed })
            }
            Call::Get { token, key, extent } => {
                let error = self.store.get(token, key, extent).err()?;
                Some(Event::SsdGetEnded { token, ending: get_ending(error) })
            }
        }
    }
}

fn get_ending(error: GetError) -> GetEnding {
    match error {
        GetError::Busy => GetEnding::Busy,
        GetError::Corrupt(_) => GetEnding::Corrupt,
        GetError::Missing | GetError::Extent { .. } | GetError::Io(_) => GetEnding::Gone,
    }
}

impl World {
    pub(super) fn start_tier(&mut self, sidecar: usize) {
        let Some(ssd) = self.plan.ssd.clone() else { return };
        let disk = Arc::clone(&self.disks[sidecar]);
        let delay = self.net.jitter(40 * MS);
        let Some(boot) = self.sidecars[sidecar].as_mut() else { return };
        boot.tier = Some(Tier::new(&disk, &boot.pool.memory, &ssd, &mut self.disk_dice));
        let id = boot.id;
        self.net.after(delay, Next::Recovered { sidecar, boot: id });
    }

    /// Recovery has ended (I7).
    pub(crate) fn recovered(&mut self, sidecar: usize) {
        let scale = self.plan.scale;
        {
            // Recovery is not what fails here: `pillion-ssd`'s own tests do that.
            let mut disk = disk_of(&self.disks[sidecar]);
            (disk.fault, disk.broken) = (None, None);
        }
        let Some(tier) = self.sidecars[sidecar].as_mut().and_then(|boot| boot.tier.as_mut()) else { return };
        let mut records = Vec::new();
        tier.recover(|entry| records.push(record(entry, scale)));
        let promised = self.oracle.disk(sidecar);
        promised.gone.clear();
        if promised.doubtful && !self.plan.strict_syncs {
            promised.lied = true;
            promised.promised.clear();
        }
        let missing = promised.promised.keys().find(|key| !tier.store.contains(&RecordKey(**key)));
        let missing =
            missing.map(|key| format!("sidecar {sidecar}: {key:02x?} was acknowledged and is not there"));
        let looked_for = promised.promised.len() as u64;
        if let Some(missing) = missing {
            self.net.broken("I7", || missing);
        }
        self.net.saw("promised blocks looked for", looked_for);
        self.net.saw("records recovered", records.len() as u64);
        self.apply(sidecar, Event::SsdFound { records });
        self.schedule_disk(sidecar);
    }

    pub(super) fn ssd_put(
        &mut self,
        sidecar: usize,
        token: u64,
        record: SsdRecord,
        offset: u64,
        durable: bool,
    ) {
        let scale = self.plan.scale;
        let skipped = self.sabotage == Some(Sabotage::SyncsSkipped);
        let Some(boot) = self.sidecars[sidecar].as_mut() else { return };
        let Some(tier) = &mut boot.tier else { return };
        let meta = RecordMeta { bytes: record.bytes / scale, ..meta(record) };
        let extent = Extent { offset: offset / scale, bytes: meta.bytes };
        tier.calls.push_back(Call::Put { token, meta, extent, durable: durable && !skipped });
        if self.sabotage == Some(Sabotage::PutsEndEarly) {
            self.tell(sidecar, Event::SsdPutEnded { token, ending: PutEnding::Stored });
        }
        self.schedule_disk(sidecar);
    }

    pub(super) fn ssd_get(&mut self, sidecar: usize, token: u64, key: [u8; 32], offset: u64, bytes: u64) {
        let scale = self.plan.scale;
        let Some(boot) = self.sidecars[sidecar].as_mut() else { return };
        boot.rotten.remove(&(offset / scale));
        let Some(tier) = &mut boot.tier else { return };
        let extent = Extent { offset: offset / scale, bytes: bytes / scale };
        tier.reading.insert(token, extent);
        tier.calls.push_back(Call::Get { token, key: RecordKey(key), extent });
        self.schedule_disk(sidecar);
    }

    pub(crate) fn schedule_disk(&mut self, sidecar: usize) {
        let delay = self.net.jitter(self.plan.disk_ns);
        let Some(boot) = self.sidecars[sidecar].as_mut() else { return };
        let Some(tier) = boot.tier.as_mut().filter(|tier| tier.is_ready && !tier.is_scheduled) else {
            return;
        };
        tier.is_scheduled = true;
        let next = Next::Disk { sidecar, boot: boot.id };
        self.net.after(delay, next);
    }

    /// The tier's threads: calls are taken, some of what is in flight ends.
    pub(crate) fn disk_step(&mut self, sidecar: usize) {
        let hangs = self.disk_until > self.net.now;
        let Some(tier) = self.sidecars[sidecar].as_mut().and_then(|boot| boot.tier.as_mut()) else { return };
        tier.is_scheduled = false;
        if hangs {
            return self.schedule_disk(sidecar);
        }
        let mut events: Vec<Event> = Vec::new();
        while let Some(call) = tier.calls.pop_front() {
            events.extend(tier.serve(call));
            if self.disk_dice.permille(300) {
                break;
            }
        }
        events.into_iter().for_each(|event| self.tell(sidecar, event));
        let fault = self.arm(sidecar);
        let Some(tier) = self.sidecars[sidecar].as_mut().and_then(|boot| boot.tier.as_mut()) else { return };
        let mut told = tier.act();
        let mut done = Vec::new();
        tier.device.wait(Some(Duration::ZERO), &mut done);
        done.into_iter().for_each(|completion| tier.store.completed(completion));
        told.extend(tier.act());
        let more = !tier.calls.is_empty() || !tier.store.is_idle();
        if let Some(fault) = fault {
            self.disarm(sidecar, fault);
        }
        for action in told {
            self.told(sidecar, action);
        }
        if more {
            self.schedule_disk(sidecar);
        }
    }

    /// Has the next operation of the disk fail, now and then.
    fn arm(&mut self, sidecar: usize) -> Option<(Fault, u64)> {
        let dice = &mut self.disk_dice;
        let kind = [Fault::DiskFails, Fault::DiskShort, Fault::DiskLies].into_iter();
        let kind = kind.filter(|fault| dice.permille(self.plan.rate(*fault))).last()?;
        let how = match kind {
            Fault::DiskFails => DiskFault::Errno(EIO),
            Fault::DiskShort => dice.pick(&[DiskFault::Short, DiskFault::Long]),
            _ => dice.pick(&[
                DiskFault::Lost,
                DiskFault::Lost,
                DiskFault::Misdirected(1),
                DiskFault::Misdirected(3),
            ]),
        };
        let mut disk = disk_of(&self.disks[sidecar]);
        disk.fault = Some((disk.operations, how));
        Some((kind, disk.operations))
    }

    fn disarm(&mut self, sidecar: usize, (kind, armed_at): (Fault, u64)) {
        let happened = {
            let mut disk = disk_of(&self.disks[sidecar]);
            disk.fault = None;
            disk.operations > armed_at
        };
        if happened {
            self.net.injected(kind);
        }
        if happened && kind == Fault::DiskLies {
            self.disk_lied(sidecar);
        }
    }

    /// From now on nothing is counted on, but that no wrong byte is served.
    pub(crate) fn disk_lied(&mut self, sidecar: usize) {
        let disk = self.oracle.disk(sidecar);
        disk.lied = true;
        disk.promised.clear();
    }

    /// What the store tells, in the core's words.
    fn told(&mut self, sidecar: usize, action: Action) {
        self.net.say(|| format!("sidecar {sidecar}, ssd: {action:?}"));
        let event = match action {
            Action::Stored { token, key, .. } => {
                self.oracle.disk(sidecar).gone.remove(&key.0);
                Event::SsdPutEnded { token, ending: PutEnding::Stored }
            }
            Action::StoreFailed { token, error, .. } => {
                self.oracle.disk(sidecar).doubtful |= matches!(error, PutError::Io(_));
                Event::SsdPutEnded { token, ending: PutEnding::Failed }
            }
            Action::Loaded { token, checksum, .. } => {
                self.net.saw("blocks read from the SSD", 1);
                Event::SsdGetEnded { token, ending: GetEnding::Loaded(checksum) }
            }
            Action::LoadFailed { token, error, .. } => {
                let trusted =
                    self.sabotage == Some(Sabotage::DiskTrusted) && matches!(error, GetError::Corrupt(_));
                let ending = if trusted { self.as_it_lies(sidecar, token) } else { get_ending(error) };
                Event::SsdGetEnded { token, ending }
            }
            Action::Dropped { key, reason } => {
                self.check_dropped(sidecar, &key.0, reason);
                Event::SsdDropped { key: key.0 }
            }
            Action::ReadOnly { .. } => return self.net.saw("directories read-only", 1),
            Action::Io { .. } | Action::WantsRoom { .. } => return,
        };
        if self.sabotage == Some(Sabotage::PutsEndEarly) && matches!(event, Event::SsdPutEnded { .. }) {
            return;
        }
        self.tell(sidecar, event);
    }

    /// For a sabotage: whatever was read counts.
    fn as_it_lies(&self, sidecar: usize, token: u64) -> GetEnding {
        let boot = self.sidecars[sidecar].as_ref();
        let read = boot.and_then(|boot| Some((&boot.pool, boot.tier.as_ref()?.reading.get(&token)?)));
        let Some((pool, extent)) = read else { return GetEnding::Corrupt };
        let mut page = vec![0; extent.bytes as usize];
        pool.read(extent.offset, &mut page);
        GetEnding::Loaded(pillion_ssd::format::checksum(&page))
    }

    /// I7: what was promised goes only for a reason.
    fn check_dropped(&mut self, sidecar: usize, key: &[u8; 32], reason: DropReason) {
        let disk = self.oracle.disk(sidecar);
        disk.doubtful |= reason == DropReason::Unsynced;
        disk.gone.insert(*key);
        let was_promised = disk.promised.remove(key).is_some();
        let is_wrong = match reason {
            DropReason::Evicted | DropReason::Unreadable => false,
            DropReason::Corrupt => !disk.lied,
            DropReason::Unsynced => was_promised,
        };
        let what = match reason {
            DropReason::Evicted => "records evicted from the SSD",
            DropReason::Corrupt => "damaged records of the SSD refused",
            DropReason::Unreadable => "records of the SSD unreadable",
            DropReason::Unsynced => "records of the SSD doubted",
        };
        self.net.saw(what, 1);
        if is_wrong {
            self.net.broken("I7", || format!("sidecar {sidecar}: {key:02x?} is dropped as {reason:?}"));
        }
    }

    /// To the core, in order.
    fn tell(&mut self, sidecar: usize, event: Event) {
        let delay = self.net.jitter(MS / 5);
        let Some(boot) = self.sidecars[sidecar].as_mut() else { return };
        let (id, now) = (boot.id, self.net.now);
        let Some(tier) = boot.tier.as_mut() else { return };
        if let Event::SsdGetEnded { token, .. } = &event {
            tier.reading.remove(token);
        }
        tier.told_at = tier.told_at.max(now + delay);
        let at = tier.told_at;
        self.net.at(at, Next::Told { sidecar, boot: id, event: Box::new(event) });
    }

    /// A bit on the disk changes.
    pub(crate) fn rot_disk(&mut self, sidecar: usize) {
        let dice = &mut self.trouble_dice;
        {
            let mut disk = disk_of(&self.disks[sidecar]);
            let slots = disk.slots();
            if slots.is_empty() {
                return;
            }
            let slot = dice.pick(&slots);
            disk.tamper(slot, |bytes| {
                // Where something lies: files begin with their records.
                let used = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0) as u64;
                let at = dice.below(used.min(40 << 10) + 1) as usize;
                bytes[at] ^= 1 << dice.below(8);
            });
        }
        self.disk_lied(sidecar);
        self.net.injected(Fault::DiskRots);
    }

    /// Everything on the disk fails for a while, or works again.
    pub(crate) fn break_disk(&mut self, sidecar: usize) {
        let what = self.trouble_dice.pick(&[What::Read, What::Write, What::Sync]);
        let mut disk = disk_of(&self.disks[sidecar]);
        disk.broken = if disk.broken.is_some() { None } else { Some((what, EIO)) };
        drop(disk);
        self.net.injected(Fault::DiskBreaks);
    }

    /// No file can be made any more, or again.
    pub(crate) fn fill_disk(&mut self, sidecar: usize) {
        let mut disk = disk_of(&self.disks[sidecar]);
        disk.files_max = if disk.files_max == usize::MAX { disk.slots().len() } else { usize::MAX };
        drop(disk);
        self.net.injected(Fault::DiskFull);
    }
}

fn record(entry: &Entry, scale: u64) -> SsdRecord {
    let meta = &entry.meta;
    SsdRecord {
        key: meta.key.0,
        space: NamespaceId(meta.space.0),
        hash: meta.hash,
        parent: meta.parent.map(|parent| parent.0),
        tenant: Arc::clone(&meta.tenant),
        format: Arc::clone(&meta.format),
        bytes: meta.bytes * scale,
        checksum: meta.checksum,
    }
}

fn meta(record: SsdRecord) -> RecordMeta {
    RecordMeta {
        key: RecordKey(record.key),
        space: SpaceId(record.space.0),
        hash: record.hash,
        parent: record.parent.map(RecordKey),
        tenant: record.tenant,
        format: record.format,
        bytes: record.bytes,
        checksum: record.checksum,
    }
}
