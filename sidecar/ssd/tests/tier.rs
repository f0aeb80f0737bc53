//! The tier on real files, with each engine that the machine has.

use std::{
    collections::HashSet,
    fs,
    path::Path,
    ptr::NonNull,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread,
    time::{Duration, Instant},
};

use pillion_ssd::{
    Aligned, Extent, GetError, Memory, OpenError,
    device::directory::{Directory, Use},
    format::{RecordKey, RecordMeta, Refused, SpaceId, checksum},
    store::{Action, Limits},
    tier::{Config, DirectoryConfig, Engine, Hooks, Started, Tier, engine},
    verify::verify,
};

const SEGMENT: u64 = 4 << 20;
const LANE: u64 = 512 << 10;
const LANES: u64 = 64;

fn scratch() -> tempfile::TempDir {
    // On the disk that builds: O_DIRECT needs a real one.
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

struct Pool {
    memory: Arc<Memory>,
    base: NonNull<u8>,
}

impl Pool {
    fn new() -> Self {
        let mut buffer = Box::new(Aligned::zeroed((LANE * LANES) as usize));
        let base = NonNull::new(buffer.bytes_mut().as_mut_ptr()).unwrap();
        // SAFETY: the buffer lives in the `Arc` and is touched through this pool only; tests keep to one user
        // of a lane at a time.
        let memory = unsafe { Memory::from_raw(base, LANE * LANES, Arc::new(buffer)) };
        Self { memory: Arc::new(memory), base }
    }

    fn lane(&self, number: u64, bytes: u64) -> Extent {
        assert!(number < LANES && bytes <= LANE);
        Extent { offset: number * LANE, bytes }
    }

    fn slice(&mut self, extent: Extent) -> &mut [u8] {
        // SAFETY: inside the buffer; no operation uses the lane while the test looks at it.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.as_ptr().add(extent.offset as usize),
                extent.bytes as usize,
            )
        }
    }
}

fn key(n: u64) -> RecordKey {
    let mut key = [7; 32];
    key[..8].copy_from_slice(&n.to_le_bytes());
    RecordKey(key)
}

/// Up to 512 KiB, in whole sectors and not: short ones are gathered, long ones go from the registered buffer.
fn bytes_of(n: u64) -> u64 {
    [4096, 65536, LANE, 135_168, 70_001, 100][(n % 6) as usize]
}

fn fill(n: u64, into: &mut [u8]) {
    for (at, word) in into.chunks_mut(8).enumerate() {
        let bytes = (n << 32 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
}

struct Run {
    tier: Tier,
    told: Receiver<Action>,
    started: Vec<Started>,
    recovered: HashSet<RecordKey>,
}

fn config(paths: &[&Path], engine: Engine) -> Config {
    let directory = |path: &&Path| DirectoryConfig { path: path.to_path_buf(), capacity_bytes: 4 * SEGMENT };
    Config {
        directories: paths.iter().map(directory).collect(),
        segment_bytes: SEGMENT,
        limits: Limits::default(),
        engine,
    }
}

fn start(paths: &[&Path], pool: &Pool, engine: Engine) -> Result<Run, OpenError> {
    let (tell, told) = channel();
    let hooks = Hooks {
        tell: Box::new(move |action| tell.send(action).unwrap_or(())),
        keep: Box::new(|wanted, _| *wanted == key(0)),
    };
    let mut recovered = HashSet::new();
    let (tier, started) = Tier::start(&config(paths, engine), &pool.memory, hooks, |entry| {
        recovered.insert(entry.meta.key);
    })?;
    Ok(Run { tier, told, started, recovered })
}

impl Run {
    fn put(&self, pool: &mut Pool, n: u64, lane: u64, durable: bool) {
        let extent = pool.lane(lane, bytes_of(n));
        fill(n, pool.slice(extent));
        let meta = RecordMeta {
            key: key(n),
            space: SpaceId([1; 16]),
            hash: [2; 32],
            parent: None,
            tenant: "default".into(),
            format: "f".into(),
            bytes: extent.bytes,
            checksum: checksum(pool.slice(extent)),
        };
        self.tier.put(n, meta, extent, durable).unwrap();
    }

    /// Until the pool is registered with every ring: before it, memory is given to the kernel by its address.
    fn await_registered(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        while self.started.iter().any(|how| how.is_registering(LANE * LANES)) {
            assert!(Instant::now() < until, "{:?}", self.started);
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn ending(&self) -> Action {
        loop {
            match self.told.recv_timeout(Duration::from_secs(20)).expect("everything ends") {
                Action::Dropped { .. } => {}
                ending => return ending,
            }
        }
    }

    fn load(&self, pool: &mut Pool, n: u64) -> Result<(), GetError> {
        let extent = pool.lane(LANES - 1, bytes_of(n));
        pool.slice(extent).fill(0);
        self.tier.get(n, key(n), extent).unwrap();
        match self.ending() {
            Action::Loaded { .. } => {}
            Action::LoadFailed { error, .. } => return Err(error),
            other => panic!("{other:?}"),
        }
        let mut wanted = vec![0; extent.bytes as usize];
        fill(n, &mut wanted);
        assert!(pool.slice(extent) == wanted);
        Ok(())
    }
}

/// The same for every engine.
fn suite(wanted: Engine) {
    let (home, other) = (scratch(), scratch());
    let paths = [home.path(), other.path()];
    let mut pool = Pool::new();
    let run = start(&paths, &pool, wanted).unwrap();
    for started in &run.started {
        // Threads instead of io_uring only where the kernel refused it, and then it is said.
        let expected =
            if wanted == Engine::Threads || started.refused.is_some() { "threads" } else { "io_uring" };
        assert_eq!(started.engine, expected);
    }
    for n in 0..48 {
        run.put(&mut pool, n, n, n % 2 == 0);
    }
    for _ in 0..48 {
        assert!(matches!(run.ending(), Action::Stored { token, durable, .. } if durable == (token % 2 == 0)));
    }
    for n in 0..48 {
        assert_eq!(run.load(&mut pool, n), Ok(()));
    }
    assert_eq!(run.load(&mut pool, 99), Err(GetError::Missing));
    drop(run);

    let run = start(&paths, &pool, wanted).unwrap();
    run.await_registered();
    assert_eq!(run.recovered.len(), 48);
    let sealed: u32 = run.started.iter().map(|started| started.report.sealed).sum();
    assert!(sealed >= 2 && run.started.iter().all(|started| started.report.scanned == 0));
    assert!(paths.iter().all(|path| fs::read_dir(path).unwrap().count() > 1), "both directories are used");
    assert_eq!(run.load(&mut pool, 47), Ok(()));
    // More than fits: segments are evicted, what is hot stays, the capacity is kept.
    for n in 100..300 {
        run.put(&mut pool, n, n % 8, false);
        assert!(matches!(run.ending(), Action::Stored { .. }));
    }
    assert_eq!(run.load(&mut pool, 0), Ok(()));
    assert_eq!(run.load(&mut pool, 299), Ok(()));
    drop(run);
    for path in paths {
        let total: u64 =
            fs::read_dir(path).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(total <= 4 * SEGMENT + 4096);
        let directory = Directory::open(path, Use::Inspect).unwrap();
        let verdict = verify(&mut *engine(directory, &pool.memory, wanted).unwrap().0);
        assert_eq!(verdict.problem_count, 0, "{verdict}");
        assert!(verdict.proved > 20);
    }
}

#[test]
fn the_tier_with_the_engine_that_the_product_chooses() {
    suite(Engine::Auto);
}

#[test]
fn the_tier_with_threads() {
    suite(Engine::Threads);
}

#[test]
fn bytes_that_change_on_the_disk_are_found_and_the_record_is_gone() {
    for wanted in [Engine::Auto, Engine::Threads] {
        let home = scratch();
        let mut pool = Pool::new();
        let run = start(&[home.path()], &pool, wanted).unwrap();
        run.put(&mut pool, 2, 0, true);
        run.ending();
        drop(run);
        let path = home.path().join("00000000.segment");
        let mut file = fs::read(&path).unwrap();
        file[8192 + 100_000] ^= 0x10;
        fs::write(&path, file).unwrap();
        let run = start(&[home.path()], &pool, wanted).unwrap();
        assert_eq!(run.load(&mut pool, 2), Err(GetError::Corrupt(Refused::Checksum("payload"))));
        assert_eq!(run.load(&mut pool, 2), Err(GetError::Missing));
    }
}

#[test]
fn what_is_not_ours_is_refused_and_left_as_it_is() {
    let pool = Pool::new();
    let why = |home: &Path| start(&[home], &pool, Engine::Threads).err().map(|error| error.to_string());
    let names = |home: &Path| {
        let mut names: Vec<_> = fs::read_dir(home).unwrap().map(|file| file.unwrap().file_name()).collect();
        names.sort();
        names
    };

    let foreign = scratch();
    fs::write(foreign.path().join("photo.jpg"), "x").unwrap();
    assert!(why(foreign.path()).unwrap().contains("`photo.jpg`"));
    assert_eq!(names(foreign.path()), ["photo.jpg"]);

    let newer = scratch();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/superblock-v2.bin");
    let mut block = fs::read(golden).unwrap();
    block[8] = 3;
    fs::write(newer.path().join("pillion-ssd"), &block).unwrap();
    fs::write(newer.path().join("00000000.segment"), "theirs").unwrap();
    assert!(why(newer.path()).unwrap().contains("format version 3, this program reads 2"));
    assert_eq!(fs::read(newer.path().join("pillion-ssd")).unwrap(), block);
    assert_eq!(fs::read(newer.path().join("00000000.segment")).unwrap(), b"theirs");

    let damaged = scratch();
    block[8] = 2;
    block[20] ^= 1;
    fs::write(damaged.path().join("pillion-ssd"), &block).unwrap();
    assert!(why(damaged.path()).unwrap().contains("the checksum of the superblock"));

    let link = scratch();
    let home = scratch();
    drop(start(&[home.path()], &pool, Engine::Threads).unwrap());
    std::os::unix::fs::symlink("/etc/hostname", home.path().join("00000002.segment")).unwrap();
    assert!(why(home.path()).is_some(), "links are not followed");
    fs::remove_file(home.path().join("00000002.segment")).unwrap();

    let first = start(&[home.path()], &pool, Engine::Threads).unwrap();
    assert!(why(home.path()).unwrap().contains("in use by another process"));
    drop(first);
    assert!(why(link.path()).is_none(), "an empty directory becomes ours");
}

#[test]
fn settings_that_cannot_be_met_are_refused_with_what_was_expected() {
    let home = scratch();
    let pool = Pool::new();
    let hooks = || Hooks { tell: Box::new(|_| ()), keep: Box::new(|_, _| false) };
    let mut small = config(&[home.path()], Engine::Threads);
    small.directories[0].capacity_bytes = 2 * SEGMENT;
    let error = Tier::start(&small, &pool.memory, hooks(), |_| ()).unwrap_err();
    assert!(error.to_string().starts_with("capacity: expected 3 to"));
    let mut odd = config(&[home.path()], Engine::Threads);
    odd.segment_bytes = 5000;
    let error = Tier::start(&odd, &pool.memory, hooks(), |_| ()).unwrap_err();
    assert!(error.to_string().starts_with("segment length: expected a multiple of 4096"));
}

#[test]
fn of_many_that_find_one_new_directory_one_makes_it_its_own() {
    let home = scratch();
    // The lock comes before the look: while somebody has it nothing is written.
    let own = || Directory::open(home.path(), Use::Own { segment_bytes: SEGMENT });
    let lock = fs::File::open(home.path()).unwrap();
    lock.lock().unwrap();
    assert!(matches!(own(), Err(OpenError::Busy { .. })));
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    drop(lock);
    let opened: Vec<_> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..8).map(|_| scope.spawn(own)).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(opened.iter().filter(|one| one.is_ok()).count(), 1);
    assert!(opened.iter().all(|one| matches!(one, Ok(_) | Err(OpenError::Busy { .. }))));
}

#[test]
fn a_file_of_another_length_is_removed_only_if_it_never_had_a_record_and_everything_else_is_right() {
    let (home, other) = (scratch(), scratch());
    let pool = Pool::new();
    drop(start(&[home.path()], &pool, Engine::Threads).unwrap());
    let unfilled = home.path().join("00000007.segment");
    let signed = home.path().join("+0000001.segment");
    fs::write(&unfilled, [0; 8192]).unwrap();
    fs::write(&signed, vec![0; SEGMENT as usize]).unwrap();
    // Another directory cannot be used: this one is left as it is.
    fs::write(other.path().join("photo.jpg"), "x").unwrap();
    assert!(start(&[home.path(), other.path()], &pool, Engine::Threads).is_err());
    assert!(unfilled.exists());
    drop(start(&[home.path()], &pool, Engine::Threads).unwrap());
    assert!(!unfilled.exists() && signed.exists());
    for length in [8192, SEGMENT as usize + 4096] {
        fs::write(&unfilled, vec![7; length]).unwrap();
        assert!(matches!(start(&[home.path()], &pool, Engine::Threads), Err(OpenError::Refused { .. })));
        assert_eq!(fs::read(&unfilled).unwrap().len(), length);
        fs::remove_file(&unfilled).unwrap();
    }
    drop(start(&[home.path()], &pool, Engine::Threads).unwrap());
}

#[test]
fn an_orderly_end_seals_what_was_queued() {
    let (home, mut pool) = (scratch(), Pool::new());
    let run = start(&[home.path()], &pool, Engine::Threads).unwrap();
    (0..20).for_each(|n| run.put(&mut pool, n, n, false));
    drop(run);
    let again = start(&[home.path()], &pool, Engine::Threads).unwrap();
    let report = again.started[0].report;
    assert_eq!((report.scanned, report.records), (0, 20));
}
