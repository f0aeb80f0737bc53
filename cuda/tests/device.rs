//! The device path on the fake device: the shipped code, with a driver of host memory behind it.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use pillion_cuda::{
    CopyError, Crew, DeviceHandle, DeviceMemory, DeviceSource, ForeignPool, Gpu, GpuParts, HostPool, Item,
    Lane, Moved, PoolOptions, Watchdog,
    driver::{self, Allocation, BatchApi, Context, Direction, Event, ExportedHandle, ForeignStream},
};
use pillion_fake_cuda::testing::{self, Faults};
use pillion_layouts::vllm::KvCacheTensor;
use pillion_layouts::vllm::groups::{Group, Pages};
use pillion_layouts::{BlockPlan, CheckedGroup, Rank, Worker};
use pillion_shm::pidfd::Process;

const LAYERS: u64 = 4;
const PAGE: u64 = 256 << 10;
const RECORD: u64 = LAYERS * PAGE;
/// More than three chunks.
const BLOCKS: u64 = 120;
const OFFSET: u64 = 4096;
/// Records lie over the borders of what is pinned at a time.
const PIN_PART: u64 = 5 * RECORD + 4096;
const PATIENCE: Duration = Duration::from_millis(400);

/// A full group and a smaller one on the same blocks.
fn plans(order: &str) -> Arc<[BlockPlan]> {
    groups(order, 0, 1).into_iter().map(|group| group.plan().clone()).collect()
}

/// The same of one of `world` ranks, with eight heads each.
fn groups(order: &str, rank: u32, world: u32) -> Vec<CheckedGroup> {
    let packing = format!("kv total_heads={} key=256 value=256 dtype=bfloat16", 8 * world);
    let block_first = order.starts_with('B');
    let group = |layers: u64| Group {
        block_tokens: 64,
        pages: vec![Pages {
            tensor: KvCacheTensor {
                size: BLOCKS * RECORD,
                offset: 0,
                layer_stride: if block_first { PAGE } else { PAGE * BLOCKS },
                block_stride: if block_first { RECORD } else { PAGE },
                layers: (0..layers).map(|layer| format!("group{layers}.layers.{layer}")).collect(),
            },
            heads: 8,
            states: 64,
            content_bytes: 512,
            page_bytes: PAGE,
            kernel_blocks: 1,
            packing: packing.parse().unwrap(),
        }],
    };
    let worker = Worker {
        order: order.into(),
        num_blocks: BLOCKS,
        memory_bytes: BLOCKS * RECORD,
        rank,
        world,
        groups: vec![group(LAYERS), group(LAYERS - 1)],
    };
    worker.check().unwrap()
}

/// An engine's memory and a sidecar's device in one process, as the fake allows for VMM memory.
struct Rig {
    gpu: Arc<Gpu>,
    pool: Arc<HostPool>,
    dog: Watchdog,
    kv: Allocation,
    plans: Arc<[BlockPlan]>,
    faults: Faults,
}

/// Makes this test executable an engine's process: the driver refuses a process its own handles.
const ENGINE: &str = "PILLION_TEST_ENGINE";

/// A process that records an event when it is told to.
struct Engine {
    child: Child,
    handle: [u8; 64],
}

impl Engine {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["engine_process", "--exact", "--nocapture"])
            .env(ENGINE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let is_handle = |line: &String| line.starts_with("event ");
        let line = said.lines().map(Result::unwrap).find(is_handle).expect("a handle");
        let digits: Vec<u8> = line.split(' ').skip(1).map(|byte| byte.parse().unwrap()).collect();
        Self { child, handle: digits.try_into().unwrap() }
    }

    fn record(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"record\n").unwrap();
        // The call returns at once there.
        thread::sleep(Duration::from_millis(50));
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn engine_process() {
    if std::env::var_os(ENGINE).is_none() {
        return;
    }
    let _faults = testing::load();
    let context = Context::retain(driver::devices().unwrap().remove(0)).unwrap();
    context.enter().unwrap();
    let event = Event::interprocess().unwrap();
    let handle: Vec<_> = event.handle().unwrap().iter().map(u8::to_string).collect();
    println!("\nevent {}", handle.join(" "));
    for _ in std::io::stdin().lines() {
        // SAFETY: the default stream exists.
        event.record(unsafe { ForeignStream::from_raw(0) }).unwrap();
    }
}

fn rig(order: &str, faults: &str) -> Rig {
    let lent = testing::load();
    lent.set(faults);
    let device = driver::devices().unwrap().remove(0);
    let context = Context::retain(device.clone()).unwrap();
    context.enter().unwrap();
    let kv = Allocation::vmm(&context, OFFSET + BLOCKS * RECORD).unwrap();
    let options = PoolOptions { bytes: BLOCKS * RECORD, touch: true, numa_node: device.numa_node };
    let pool = Arc::new(HostPool::with(options).unwrap());
    let dog = Watchdog::default();
    let parts = GpuParts {
        device,
        pool: Arc::clone(&pool),
        crew: Arc::new(Crew::start(1).unwrap()),
        watchdog: dog.clone(),
        batch: true,
        patience: PATIENCE,
        call_patience: PATIENCE,
        pin_part: PIN_PART,
    };
    let gpu = Arc::new(Gpu::start(parts).unwrap());
    Rig { gpu, pool, dog, kv, plans: plans(order), faults: lent }
}

impl Rig {
    fn source(&self, process: u32, events: Vec<[u8; 64]>) -> DeviceSource {
        let exported = driver::export(self.kv.base() + OFFSET, BLOCKS * RECORD).unwrap();
        let ExportedHandle::Vmm(fd) = exported.handle else { panic!("expected a descriptor") };
        DeviceSource {
            handle: DeviceHandle::Vmm(fd),
            allocation_bytes: exported.allocation_bytes,
            offset: exported.offset,
            bytes: BLOCKS * RECORD,
            events,
            process: Process::open(process as i32).unwrap(),
        }
    }

    fn import(&self) -> Arc<DeviceMemory> {
        Arc::new(self.gpu.import(self.own()).unwrap())
    }

    fn own(&self) -> DeviceSource {
        self.source(std::process::id(), Vec::new())
    }

    fn lane(&self, memory: &Arc<DeviceMemory>, direction: Direction) -> Lane {
        Lane::new(Arc::clone(&self.gpu), Arc::clone(memory), Arc::clone(&self.plans), direction).unwrap()
    }

    /// The engine's own view: on the fake, device addresses can be read and written here.
    #[expect(clippy::mut_from_ref, reason = "one thread of a test at a time")]
    fn kv(&self) -> &mut [u8] {
        let start = (self.kv.base() + OFFSET) as *mut u8;
        // SAFETY: the fake maps device memory at its address, and the allocation is this long.
        unsafe { std::slice::from_raw_parts_mut(start, (BLOCKS * RECORD) as usize) }
    }

    fn block(&self, block: u64) -> Vec<u8> {
        self.block_of(0, block)
    }

    fn block_of(&self, group: u16, block: u64) -> Vec<u8> {
        let (kv, mut bytes) = (self.kv(), Vec::with_capacity(RECORD as usize));
        for segment in self.plans[usize::from(group)].segments(block) {
            bytes.extend_from_slice(&kv[segment.engine as usize..(segment.engine + segment.len) as usize]);
        }
        bytes
    }

    /// Every 4 KiB of the engine's memory is different.
    fn fill(&self) {
        let pattern: Vec<u8> = (0..4096u32).map(|at| (at * 31 + at / 257) as u8).collect();
        for (number, place) in self.kv().chunks_exact_mut(4096).enumerate() {
            place.copy_from_slice(&pattern);
            place[..8].copy_from_slice(&(number as u64).to_le_bytes());
        }
    }

    fn record(&self, offset: u64) -> &[u8] {
        // SAFETY: no copy runs when a test looks.
        unsafe { self.pool.record(offset, RECORD) }.unwrap()
    }
}

/// Blocks in an order of their own, records in another.
fn items() -> Vec<Item> {
    let item = |index: u64| Item {
        group: 0,
        block: (index * 7 + 3) % BLOCKS,
        foreign: None,
        offset: index * RECORD,
        checksum: 0,
    };
    (0..BLOCKS).map(item).collect()
}

fn with_checksums(items: &[Item], moved: &[Moved]) -> Vec<Item> {
    let known = |(item, moved): (&Item, &Moved)| match moved {
        Moved::Copied(checksum) => Item { checksum: *checksum, ..item.clone() },
        other => panic!("block {} was not saved: {other:?}", item.block),
    };
    items.iter().zip(moved).map(known).collect()
}

fn go() -> AtomicBool {
    AtomicBool::new(false)
}

fn round_trip(rig: &Rig) {
    rig.fill();
    let memory = rig.import();
    assert_eq!(memory.way(), "cuda_vmm");
    let before: Vec<_> = (0..BLOCKS).map(|block| rig.block(block)).collect();
    let saved = rig.lane(&memory, Direction::Out).run(&items(), None, &go());
    let items = with_checksums(&items(), &saved);
    for item in &items {
        assert!(rig.record(item.offset) == before[item.block as usize], "record of block {}", item.block);
    }
    rig.kv().fill(0xee);
    let loaded = rig.lane(&memory, Direction::In).run(&items, None, &go());
    assert!(loaded.iter().all(|moved| matches!(moved, Moved::Copied(_))), "{loaded:?}");
    for block in 0..BLOCKS {
        assert!(rig.block(block) == before[block as usize], "block {block}");
    }
    assert_eq!(rig.faults.count("pageable"), 0, "the pool is registered");
    assert_eq!(rig.dog.stuck(), None);
}

/// Records of a neighbour's pool go through pinned memory, proved there; more of them than fit into one chunk.
#[test]
fn records_of_a_neighbour_are_proved_on_their_way() {
    let rig = rig("LBHNC", "");
    rig.fill();
    let memory = rig.import();
    let before: Vec<_> = (0..BLOCKS).map(|block| rig.block(block)).collect();
    let saved = rig.lane(&memory, Direction::Out).run(&items(), None, &go());
    let mut items = with_checksums(&items(), &saved);
    let other = Arc::new(HostPool::create(rig.pool.bytes()).unwrap());
    for item in &items {
        // SAFETY: nobody else knows this pool yet.
        unsafe { other.record_mut(item.offset, RECORD) }.unwrap().copy_from_slice(rig.record(item.offset));
    }
    let fd = other.memfd().fd().try_clone_to_owned().unwrap();
    let foreign = Arc::new(ForeignPool::open(fd, other.bytes()).unwrap());
    for item in items.iter_mut().filter(|item| item.block % 3 != 0) {
        item.foreign = Some(Arc::clone(&foreign));
    }
    let bad = items.iter().position(|item| item.foreign.is_some()).unwrap();
    // SAFETY: no copy runs.
    unsafe { other.record_mut(items[bad].offset, RECORD) }.unwrap()[17] ^= 1;
    let outside = items.iter().rposition(|item| item.foreign.is_some()).unwrap();
    items[outside].offset = other.bytes() - RECORD + 1;
    rig.kv().fill(0xee);
    let loaded = rig.lane(&memory, Direction::In).run(&items, None, &go());
    for (index, (item, moved)) in items.iter().zip(&loaded).enumerate() {
        let copied = matches!(moved, Moved::Copied(checksum) if *checksum == item.checksum);
        assert_eq!(copied, index != bad && index != outside, "{moved:?}");
        let expected = if copied { before[item.block as usize].clone() } else { vec![0xee; RECORD as usize] };
        assert!(rig.block(item.block) == expected, "block {}", item.block);
    }
    assert_eq!(rig.faults.count("pageable"), 0, "the stage is registered");
}

/// What ranks of other sizes stored: of one record a half, of others all for half of a block.
#[test]
fn parts_of_other_sizes_records_are_proved_whole_and_loaded() {
    for order in ["BLHNC", "LBHNC"] {
        let mut rig = rig(order, "");
        let own = groups(order, 1, 2).remove(0);
        let other = |index, size| own.other_shard(Rank { index, size }).unwrap().plan().clone();
        rig.plans = [own.plan().clone(), other(0, 1), other(2, 4), other(3, 4)].into();
        let bytes: Vec<u64> = rig.plans.iter().map(BlockPlan::record_bytes).collect();
        assert_eq!(bytes, [RECORD, 2 * RECORD, RECORD / 2, RECORD / 2]);
        let memory = rig.import();
        // SAFETY: no copy runs.
        let pool = unsafe { rig.pool.record_mut(0, 8 * RECORD) }.unwrap();
        for (number, place) in pool.chunks_exact_mut(512).enumerate() {
            place.fill(number as u8);
            place[..8].copy_from_slice(&(number as u64).to_le_bytes());
        }
        let item = |group: u16, block, offset| {
            let length = bytes[usize::from(group)];
            // SAFETY: as above.
            let record = unsafe { rig.pool.record(offset, length) }.unwrap();
            let checksum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, record);
            Item { group, block, foreign: None, offset, checksum }
        };
        let items = [item(1, 5, 0), item(2, 6, 2 * RECORD), item(3, 6, 4 * RECORD), item(1, 7, 5 * RECORD)];
        // SAFETY: as above. A head that this rank does not hold.
        unsafe { rig.pool.record_mut(5 * RECORD, RECORD) }.unwrap()[3] ^= 1;
        rig.kv().fill(0xee);
        let moved = rig.lane(&memory, Direction::In).run(&items, None, &go());
        assert!(moved[..3].iter().all(|moved| matches!(moved, Moved::Copied(_))), "{moved:?}");
        assert!(matches!(moved[3], Moved::Failed(CopyError::Corrupt { .. })), "{moved:?}");
        let mut expected = vec![0xee; rig.kv().len()];
        for item in &items[..3] {
            // SAFETY: as above.
            let record = unsafe { rig.pool.record(item.offset, bytes[usize::from(item.group)]) }.unwrap();
            for run in rig.plans[usize::from(item.group)].segments(item.block) {
                let (to, from, len) = (run.engine as usize, run.record as usize, run.len as usize);
                expected[to..to + len].copy_from_slice(&record[from..from + len]);
            }
        }
        assert!(rig.kv() == expected, "the parts, and nothing else");
        for block in [5, 6] {
            assert!(
                !rig.block(block).chunks(512).any(|cell| cell == [0xee; 512]),
                "all heads of block {block}"
            );
        }
        let saved = rig.lane(&memory, Direction::Out).run(&items[..1], None, &go());
        assert_eq!(saved, [Moved::Failed(CopyError::OnlyLoaded { group: 1 })]);
    }
}

/// Records of two sizes in one job, without room between them, over the borders of chunks and pins.
#[test]
fn one_job_moves_blocks_of_several_groups() {
    for order in ["BLHNC", "LBHNC"] {
        let rig = rig(order, "");
        rig.fill();
        let memory = rig.import();
        let mut offset = 0;
        let item = |(index, item): (usize, Item)| {
            let group = u16::from(index % 3 != 0);
            let item = Item { group, offset, ..item };
            offset += rig.plans[usize::from(group)].record_bytes();
            item
        };
        let items: Vec<Item> = items().into_iter().enumerate().map(item).collect();
        let before: Vec<_> = items.iter().map(|item| rig.block_of(item.group, item.block)).collect();
        let saved = rig.lane(&memory, Direction::Out).run(&items, None, &go());
        let mut items = with_checksums(&items, &saved);
        for (item, before) in items.iter().zip(&before) {
            // SAFETY: no copy runs.
            let record = unsafe { rig.pool.record(item.offset, before.len() as u64) }.unwrap();
            assert!(record == before, "record of block {}", item.block);
        }
        rig.kv().fill(0xee);
        // A checksum of another group's record, in the middle of a chunk.
        items[7].group = 1 - items[7].group;
        let loaded = rig.lane(&memory, Direction::In).run(&items, None, &go());
        for (index, (item, before)) in items.iter().zip(&before).enumerate() {
            let copied = matches!(loaded[index], Moved::Copied(checksum) if checksum == item.checksum);
            assert_eq!(copied, index != 7, "{:?}", loaded[index]);
            let now = rig.block_of(item.group, item.block);
            match copied {
                true => assert!(now == *before, "block {}", item.block),
                false => assert!(now.iter().all(|byte| *byte == 0xee), "bytes that were not proved"),
            }
        }
    }
}

#[test]
fn blocks_go_out_and_in_in_every_way_that_drivers_copy() {
    for order in ["BLHNC", "LBHNC"] {
        for (faults, name) in
            [("", "batch (13.0)"), ("driver 12080", "batch (12.8)"), ("driver 12040", "single")]
        {
            let rig = rig(order, faults);
            assert_eq!(rig.gpu.batch().name(), name);
            round_trip(&rig);
        }
    }
}

#[test]
fn where_the_batch_call_fails_copies_go_one_by_one() {
    let rig = rig("LBHNC", "cuMemcpyBatchAsync_v2 error 801");
    assert!(matches!(rig.gpu.batch(), BatchApi::V13(_)));
    round_trip(&rig);
    assert!(rig.faults.count("cuMemcpyAsync") >= BLOCKS * LAYERS);
}

#[test]
fn a_damaged_record_does_not_reach_the_device() {
    let rig = rig("BLHNC", "");
    rig.fill();
    let memory = rig.import();
    let saved = rig.lane(&memory, Direction::Out).run(&items(), None, &go());
    let items = with_checksums(&items(), &saved);
    let bad = items[50].clone();
    // SAFETY: no copy runs.
    unsafe { rig.pool.record_mut(bad.offset, RECORD) }.unwrap()[RECORD as usize - 1] ^= 1;
    rig.kv().fill(0xee);
    let loaded = rig.lane(&memory, Direction::In).run(&items, None, &go());
    for (item, moved) in items.iter().zip(&loaded) {
        let untouched = rig.block(item.block) == [0xee; RECORD as usize];
        let is_bad = item.block == bad.block;
        assert_eq!(untouched, is_bad, "block {}", item.block);
        assert_eq!(matches!(moved, Moved::Failed(CopyError::Corrupt { .. })), is_bad);
    }
}

#[test]
fn a_copy_waits_for_the_engines_event() {
    let rig = rig("BLHNC", "");
    let mut engine = Engine::start();
    let wrong = rig.source(engine.child.id(), vec![engine.handle, [0; 64]]);
    let error = rig.gpu.import(wrong).unwrap_err().to_string();
    assert!(error.contains("events cannot be opened") && error.contains("/dev/shm"), "{error}");
    let source = rig.source(engine.child.id(), vec![engine.handle]);
    let memory = Arc::new(rig.gpu.import(source).unwrap());
    // Never recorded: nothing to wait for. No such event: nothing is copied.
    rig.kv().fill(1);
    let saved = rig.lane(&memory, Direction::Out).run(&items()[..3], Some(0), &go());
    let before = with_checksums(&items()[..3], &saved);
    let failed = rig.lane(&memory, Direction::In).run(&before, Some(1), &go());
    assert!(failed.iter().all(|moved| matches!(moved, Moved::Failed(CopyError::Unreachable(_)))));
    // What is recorded now is not reached while the line is there: the forward pass still runs.
    rig.faults.set("record hang");
    engine.record();
    let (cancelled, began, ended) = (go(), Instant::now(), go());
    let (moved, early) = thread::scope(|scope| {
        let save = scope.spawn(|| {
            let moved = rig.lane(&memory, Direction::Out).run(&items(), Some(0), &cancelled);
            ended.store(true, Ordering::Release);
            moved
        });
        thread::sleep(2 * PATIENCE);
        let early = (ended.load(Ordering::Acquire), rig.dog.stuck());
        rig.fill();
        rig.faults.clear();
        (save.join().unwrap(), early)
    });
    assert_eq!(early, (false, None), "an engine may compute as long as it likes");
    assert!(began.elapsed() >= 2 * PATIENCE);
    for item in &with_checksums(&items(), &moved) {
        assert!(rig.record(item.offset) == rig.block(item.block), "what lay there before it was computed");
    }
}

#[test]
fn a_cancelled_job_stops_at_the_next_chunk_and_leaves_nothing_under_way() {
    let rig = rig("BLHNC", "");
    rig.fill();
    let memory = rig.import();
    rig.faults.set("copy rate 400");
    let cancelled = go();
    let moved = thread::scope(|scope| {
        let save = scope.spawn(|| rig.lane(&memory, Direction::Out).run(&items(), None, &cancelled));
        thread::sleep(Duration::from_millis(20));
        cancelled.store(true, Ordering::Release);
        save.join().unwrap()
    });
    rig.faults.clear();
    let copied = moved.iter().filter(|moved| matches!(moved, Moved::Copied(_))).count();
    assert!(copied > 0 && copied < BLOCKS as usize, "{copied} of {BLOCKS}");
    assert!(moved[copied..].iter().all(|moved| *moved == Moved::Skipped));
    let later: Vec<u8> = rig.record(items()[copied].offset).to_vec();
    thread::sleep(Duration::from_millis(50));
    assert!(later == rig.record(items()[copied].offset), "a late write");
}

/// Runs a job on a thread that may never come back; why the watchdog then gives the process up.
fn given_up(rig: &Rig, memory: Arc<DeviceMemory>, faults: &'static str) -> Option<String> {
    given_up_with(rig, memory, None, faults)
}

fn given_up_with(
    rig: &Rig,
    memory: Arc<DeviceMemory>,
    event: Option<u32>,
    faults: &'static str,
) -> Option<String> {
    let (gpu, plans) = (Arc::clone(&rig.gpu), Arc::clone(&rig.plans));
    let done = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&done);
    let (made, is_made) = std::sync::mpsc::channel();
    let (begin, may_begin) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut lane = Lane::new(gpu, memory, plans, Direction::Out).unwrap();
        made.send(()).unwrap();
        may_begin.recv().unwrap();
        let _ = lane.run(&items(), event, &AtomicBool::new(false));
        ended.store(true, Ordering::Release);
    });
    is_made.recv().unwrap();
    rig.faults.set(faults);
    begin.send(()).unwrap();
    let until = Instant::now() + 10 * PATIENCE;
    while rig.dog.stuck().is_none() && Instant::now() < until && !done.load(Ordering::Acquire) {
        thread::sleep(Duration::from_millis(10));
    }
    assert!(!done.load(Ordering::Acquire), "a job ended of which nobody knows what it still writes");
    rig.dog.stuck()
}

#[test]
fn a_device_that_hangs_ends_the_process_and_not_the_job() {
    if !testing::alone("a_device_that_hangs_ends_the_process_and_not_the_job") {
        return;
    }
    let rig = rig("BLHNC", "");
    let memory = rig.import();
    let text = given_up(&rig, memory, "copy hang");
    assert_eq!(text.as_deref(), Some("a copy between device and host does not end"));
    std::mem::forget(rig);
}

#[test]
fn a_lost_context_ends_the_process_and_not_the_job() {
    if !testing::alone("a_lost_context_ends_the_process_and_not_the_job") {
        return;
    }
    let rig = rig("BLHNC", "");
    let memory = rig.import();
    let text = given_up(&rig, memory, "copy error 719").unwrap();
    assert!(text.contains("the CUDA context is lost") && text.contains("719"), "{text}");
    std::mem::forget(rig);
}

#[test]
fn a_call_that_hangs_ends_the_process() {
    if !testing::alone("a_call_that_hangs_ends_the_process") {
        return;
    }
    let rig = rig("BLHNC", "");
    let memory = rig.import();
    let text = given_up(&rig, memory, "cuMemcpyBatchAsync_v2 hang");
    assert_eq!(text.as_deref(), Some("the queueing of copies does not come back"));
    std::mem::forget(rig);
}

#[test]
fn an_event_whose_engine_is_gone_and_that_is_never_reached_costs_its_job_only() {
    let rig = rig("BLHNC", "");
    let mut engine = Engine::start();
    let source = rig.source(engine.child.id(), vec![engine.handle]);
    let memory = Arc::new(rig.gpu.import(source).unwrap());
    let mut lane = rig.lane(&memory, Direction::Out);
    // Opened while its process lives, as in the middle of an engine's life.
    assert!(lane.run(&items()[..1], Some(0), &go()).iter().all(|moved| matches!(moved, Moved::Copied(_))));
    rig.faults.set("record hang");
    engine.record();
    // Cancelled, as by a deadline: nothing was begun.
    let skipped = lane.run(&items(), Some(0), &AtomicBool::new(true));
    assert!(skipped.iter().all(|moved| *moved == Moved::Skipped));
    engine.kill();
    let failed = lane.run(&items(), Some(0), &go());
    assert!(failed.iter().all(|moved| matches!(moved, Moved::Failed(CopyError::Unreachable(_)))));
    assert_eq!(rig.dog.stuck(), None);
}

#[test]
fn an_event_that_the_driver_cannot_ask_for_costs_its_job_unless_the_context_is_lost() {
    if !testing::alone("an_event_that_the_driver_cannot_ask_for_costs_its_job_unless_the_context_is_lost") {
        return;
    }
    let rig = rig("BLHNC", "");
    let engine = Engine::start();
    let source = rig.source(engine.child.id(), vec![engine.handle]);
    let memory = Arc::new(rig.gpu.import(source).unwrap());
    let mut lane = rig.lane(&memory, Direction::Out);
    rig.faults.set("cuEventQuery error 400 times 1");
    let failed = lane.run(&items(), Some(0), &go());
    assert!(failed.iter().all(|moved| matches!(moved, Moved::Failed(CopyError::Unreachable(_)))));
    assert_eq!(rig.dog.stuck(), None);
    assert!(lane.run(&items()[..2], Some(0), &go()).iter().all(|moved| matches!(moved, Moved::Copied(_))));
    drop(lane);
    let text = given_up_with(&rig, memory, Some(0), "cuEventQuery error 700\ncuStreamSynchronize error 700")
        .unwrap();
    assert!(text.contains("the CUDA context is lost") && text.contains("700"), "{text}");
    std::mem::forget(rig);
}

#[test]
fn an_unmap_that_never_returns_is_noticed_and_one_that_returns_is_told() {
    let rig = rig("BLHNC", "");
    let closed = Arc::new(AtomicUsize::new(0));
    let import = || {
        let mut memory = rig.gpu.import(rig.own()).unwrap();
        let closed = Arc::clone(&closed);
        memory.when_closed(move || {
            let _ = closed.fetch_add(1, Ordering::Release);
        });
        memory
    };
    let (first, second) = (import(), import());
    assert_eq!(rig.faults.count("live_imports"), 2);
    drop(first);
    assert_eq!((closed.load(Ordering::Acquire), rig.faults.count("live_imports")), (1, 1));
    rig.faults.set("cuMemUnmap hang");
    let unmapping = thread::spawn(move || drop(second));
    thread::sleep(2 * PATIENCE);
    let text = rig.dog.stuck();
    assert_eq!(text.as_deref(), Some("the unmapping of an engine's memory does not come back"));
    assert_eq!(closed.load(Ordering::Acquire), 1);
    rig.faults.clear();
    unmapping.join().unwrap();
    assert_eq!((rig.dog.stuck(), closed.load(Ordering::Acquire)), (None, 2));
}

#[test]
fn memory_that_cannot_be_imported_is_an_error_with_its_reason() {
    let rig = rig("BLHNC", "cuMemImportFromShareableHandle error 304");
    let error = rig.gpu.import(rig.own()).unwrap_err().to_string();
    assert!(
        error.contains("cuMemImportFromShareableHandle failed with CUDA_ERROR_OPERATING_SYSTEM (304)"),
        "{error}"
    );
    rig.faults.set("cuMemMap error 2");
    assert!(rig.gpu.import(rig.own()).is_err());
    rig.faults.set("cuMemSetAccess error 1");
    assert!(rig.gpu.import(rig.own()).is_err());
    rig.faults.clear();
    assert_eq!(rig.faults.count("live_imports"), 0, "what was half done is undone");
    let outside = DeviceSource { bytes: u64::MAX, ..rig.own() };
    assert!(rig.gpu.import(outside).unwrap_err().to_string().contains("inside its allocation"));
    // Blocks beyond the plan, records beyond the pool, groups that are not there: never an address.
    let memory = rig.import();
    let wrong = [
        Item { group: 0, block: BLOCKS, foreign: None, offset: 0, checksum: 0 },
        Item { group: 0, block: 0, foreign: None, offset: BLOCKS * RECORD - 1, checksum: 0 },
        Item { group: 2, block: 0, foreign: None, offset: 0, checksum: 0 },
    ];
    for item in wrong {
        for direction in [Direction::Out, Direction::In] {
            let moved = rig.lane(&memory, direction).run(std::slice::from_ref(&item), None, &go());
            assert!(matches!(moved[..], [Moved::Failed(_)]), "{moved:?}");
        }
    }
}

#[test]
fn the_pinning_of_the_pool_that_fails_says_what_failed() {
    let faults = testing::load();
    faults.set("cuMemHostRegister_v2 error 2");
    let device = driver::devices().unwrap().remove(0);
    let parts = GpuParts {
        device,
        pool: Arc::new(HostPool::create(RECORD).unwrap()),
        crew: Arc::new(Crew::start(0).unwrap()),
        watchdog: Watchdog::default(),
        batch: true,
        patience: PATIENCE,
        call_patience: PATIENCE,
        pin_part: PIN_PART,
    };
    let error = Gpu::start(parts).unwrap_err().to_string();
    assert!(error.contains("cuMemHostRegister failed with CUDA_ERROR_OUT_OF_MEMORY (2)"), "{error}");
}
