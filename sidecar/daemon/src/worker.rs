//! The process that serves engines: set up, run, drain.

use std::{
    cell::RefCell,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result};
use pillion_core::{Core, Limits};
use pillion_cuda::Watchdog;
use pillion_shm::clock;
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, unix::pipe},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::LocalSet,
    time::{MissedTickBehavior, interval},
};

use crate::{
    config::{Config, HttpListen},
    copier::Copiers,
    device,
    driver::{Driver, Parts, SESSION_JOBS_MAX, SharedDriver},
    http,
    metrics::Metrics,
    neighbours,
    places::{Machine, Places, open_private},
    report,
    secret::ClusterSecret,
    session, ssd,
};

/// How often the worker looks whether its socket is still there, beats, and updates metrics.
const LOOK: Duration = Duration::from_millis(250);

/// What the SSD has for sealing, however long the drain took.
const SEAL_MIN: Duration = Duration::from_millis(500);

/// How long a lease waits for what neighbours say.
const BORROW_WAIT: Duration = Duration::from_millis(200);

/// A core that has not ticked for so long does not serve.
const TICKING_NS: u64 = 1_000_000_000;

/// Readiness and metrics for HTTP.
#[derive(Debug)]
struct Shown {
    metrics: Arc<Metrics>,
    listening: AtomicBool,
    draining: AtomicBool,
    /// When the core last ticked, in ns of the monotonic clock.
    ticked_ns: AtomicU64,
}

impl http::Shown for Shown {
    fn metrics(&self) -> String {
        self.metrics.encode()
    }

    fn missing(&self) -> Vec<&'static str> {
        let silent_ns = clock::monotonic_ns().saturating_sub(self.ticked_ns.load(Ordering::Acquire));
        let latches = [
            // Nothing is served before the pool is mapped; this state is made after it.
            ("pool ready", true),
            ("socket listening", self.listening.load(Ordering::Acquire)),
            ("core ticking", silent_ns < TICKING_NS && !self.draining.load(Ordering::Acquire)),
        ];
        latches.into_iter().filter(|(_, there)| !there).map(|(name, _)| name).collect()
    }
}

/// Crash-only: no half-alive daemon. A panic, on whatever thread, ends the process once it has been said.
pub fn abort_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        std::process::abort();
    }));
}

/// Runs until it is told to stop; a panic anywhere ends the process.
///
/// # Errors
/// What kept it from starting.
pub fn run(config: Config, restarts: u64) -> Result<()> {
    abort_on_panic();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = LocalSet::new();
    runtime.block_on(local.run_until(serve(config, restarts)))
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).context("the kernel gives no randomness")?;
    Ok(bytes)
}

async fn serve(config: Config, restarts: u64) -> Result<()> {
    let started = Instant::now();
    let places = Places::choose(&config, &Machine)?;
    places.prepare(config.admits_other_users())?;
    let secret = ClusterSecret::open_or_create(&places.secret())?;
    let watchdog = Watchdog::default();
    let device::Memory { pool, gpu } = prepare(&config, &watchdog).await?;
    let pool_bytes = pool.bytes();
    let (tell, mut told) = mpsc::unbounded_channel();
    let recovering = match config.ssd.is_empty() {
        true => None,
        false => Some(ssd::start(&config, &pool, tell)?),
    };
    let metrics = Arc::new(Metrics::new(env!("CARGO_PKG_VERSION"), SystemTime::now()));
    let (reports, mut copied) = mpsc::unbounded_channel();
    let copiers = Copiers::start(config.copy_threads, Arc::clone(&pool), &reports)
        .context("cannot start the copy threads")?;
    let (unmapped, mut unmappings) = mpsc::unbounded_channel();
    let generation = random()?;
    let core = Core::new(Limits {
        pool_bytes,
        // A pool that is leased to the last byte could take no save.
        pinned_bytes_max: pool_bytes / 8 * 7,
        leases_max: config.max_leases as usize,
        session_jobs_max: SESSION_JOBS_MAX,
        lease_ns: config.lease().as_nanos() as u64,
        lease_seed: random()?,
        borrow_wait_ns: BORROW_WAIT.as_nanos() as u64,
        ssd: config.ssd_limits(pool_bytes),
    });
    let presence_slots = config.presence_slots;
    let driver: SharedDriver = Rc::new(RefCell::new(Driver::new(Parts {
        core,
        copiers,
        pool,
        stale_ms: (config.table_stamp_ms * 5) as u32,
        device: config.device.clone(),
        ssd: recovering.is_some().then(|| ssd::Ssd::starting(&config)),
        gpu,
        metrics: Arc::clone(&metrics),
        presence_slots,
        pool_bytes,
        generation,
        restarts,
    })));
    let shown = Arc::new(Shown {
        metrics,
        listening: AtomicBool::new(false),
        draining: AtomicBool::new(false),
        ticked_ns: AtomicU64::new(0),
    });
    let (stop_http, stopped) = tokio::sync::oneshot::channel::<()>();
    let http = listen_http(&config, &shown, stopped).await?;
    let shared = Rc::new(session::Shared {
        config,
        secret,
        driver: Rc::clone(&driver),
        status: report::json,
        http,
        socket: places.socket.clone(),
        started,
        greetings: std::cell::Cell::new(0),
        reports,
        unmapped,
    });
    write_pid(&places.worker_pid())?;
    if let Some(recovering) = recovering {
        recover(&driver, recovering, &watchdog).await?;
    }
    let disk = Rc::clone(&driver);
    tokio::task::spawn_local(async move {
        while let Some(told) = told.recv().await {
            disk.borrow_mut().ssd_told(told);
        }
    });
    let ready = Rc::clone(&driver);
    tokio::task::spawn_local(async move {
        while let Some(report) = copied.recv().await {
            ready.borrow_mut().copied(report);
        }
    });
    let letting_go = Rc::clone(&driver);
    tokio::task::spawn_local(async move {
        while let Some((session, import)) = unmappings.recv().await {
            letting_go.borrow_mut().unmapped(session, import);
        }
    });
    if shared.config.neighbours {
        let runtime_dir = places.runtime_dir.clone();
        tokio::task::spawn_local(neighbours::look_around(Rc::clone(&shared), runtime_dir));
    }
    let (ticking, ticked) = (Rc::clone(&driver), Arc::clone(&shown));
    let mut stamps = interval(shared.config.table_stamp());
    stamps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::task::spawn_local(async move {
        loop {
            stamps.tick().await;
            ticking.borrow_mut().tick();
            ticked.ticked_ns.store(clock::monotonic_ns(), Ordering::Release);
        }
    });
    tracing::info!(
        socket = %places.socket.display(),
        pool_mib = pool_bytes >> 20,
        http = http.map(|address| address.to_string()),
        pid = std::process::id(),
        "serving"
    );
    accept(&shared, &shown, &places.socket, &watchdog).await?;
    shown.draining.store(true, Ordering::Release);
    drain(&driver, shared.config.drain(), &watchdog).await;
    let _ = std::fs::remove_file(&places.socket);
    let _ = stop_http.send(());
    tracing::info!("stopped");
    Ok(())
}

/// Waits for the SSD, so that the first engine finds what is there; but not for ever.
async fn recover(driver: &SharedDriver, recovering: ssd::Recovering, watchdog: &Watchdog) -> Result<()> {
    const GONE: &str = "the recovery of the SSD ended without a result";
    let begun = Instant::now();
    let ssd::Recovering { mut answer, fails } = recovering;
    while begun.elapsed() < ssd::RECOVERY_WAIT && !fails.load(Ordering::Acquire) {
        tokio::select! {
            recovered = &mut answer => {
                driver.borrow_mut().ssd_recovered(recovered.context(GONE)??);
                return Ok(());
            }
            () = tokio::time::sleep(LOOK) => {
                beat();
                end_if_stuck(watchdog);
            }
        }
    }
    if !fails.load(Ordering::Acquire) {
        tracing::warn!("the SSD is slow: serving without what is on it until it has been read");
    }
    let driver = Rc::clone(driver);
    tokio::task::spawn_local(async move {
        match answer.await.context(GONE).flatten() {
            Ok(recovered) => driver.borrow_mut().ssd_recovered(recovered),
            Err(error) => {
                tracing::error!("{error:#}");
                std::process::exit(1);
            }
        }
    });
    Ok(())
}

async fn listen_http(
    config: &Config,
    shown: &Arc<Shown>,
    stop: tokio::sync::oneshot::Receiver<()>,
) -> Result<Option<std::net::SocketAddr>> {
    let HttpListen::On(first) = config.http else { return Ok(None) };
    let (listener, address) = http::bind(first).await?;
    let shown = Arc::clone(shown);
    tokio::task::spawn_local(async move {
        let stop = async move {
            let _ = stop.await;
        };
        if let Err(error) = http::serve(listener, shown, stop).await {
            tracing::error!("http ended: {error}");
        }
    });
    Ok(Some(address))
}

fn write_pid(path: &Path) -> Result<()> {
    use std::io::Write;
    let mut file = open_private(path, false)?;
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(())
}

/// Listens on the path, taking the place of whatever is left there: the supervisor's lock says
/// that nobody else serves it.
fn bind(path: &Path, others: bool) -> Result<(UnixListener, (u64, u64))> {
    let _ = std::fs::remove_file(path);
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    let mode = if others { 0o666 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    let found = std::fs::metadata(path)?;
    Ok((listener, (found.dev(), found.ino())))
}

/// Takes connections until the process is to stop.
async fn accept(
    shared: &Rc<session::Shared>,
    shown: &Arc<Shown>,
    path: &Path,
    watchdog: &Watchdog,
) -> Result<()> {
    let others = shared.config.admits_other_users();
    let (mut listener, mut place) = bind(path, others)?;
    shown.listening.store(true, Ordering::Release);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut supervisor = tokio::spawn(async {
        // Only a pipe is a supervisor's; by hand, standard input may be anything.
        let stdin = rustix::io::dup(rustix::stdio::stdin()).map(std::fs::File::from);
        let Some(mut pipe) = stdin.ok().and_then(|file| pipe::Receiver::from_file(file).ok()) else {
            return std::future::pending().await;
        };
        let _ = pipe.read(&mut [0u8; 1]).await;
    });
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                // Counted here: connections are accepted faster than their tasks run.
                Ok((stream, _)) => {
                    if let Some(greeting) = session::Greeting::begin(&stream, shared) {
                        tokio::task::spawn_local(session::run(stream, greeting, Rc::clone(shared)));
                    }
                }
                // Out of descriptors, most likely: the next look comes first.
                Err(error) => {
                    tracing::error!("cannot accept a connection: {error}");
                    tokio::time::sleep(LOOK).await;
                }
            },
            _ = look.tick() => {
                beat();
                end_if_stuck(watchdog);
                shared.driver.borrow().metrics.set_core(&shared.driver.borrow().counters());
                let found = std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
                if found != Some(place) {
                    tracing::warn!(socket = %path.display(), "the socket is gone or another's: listening anew");
                    (listener, place) = bind(path, others)?;
                }
                let idle = shared.driver.borrow().idle();
                if shared.config.idle_exit().is_some_and(|limit| idle > limit) {
                    tracing::info!("no engine for {} s: exiting", idle.as_secs());
                    return Ok(());
                }
            }
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = &mut supervisor => {
                tracing::warn!("the supervisor is gone: draining");
                return Ok(());
            }
        }
    }
}

/// The supervisor listens for this.
fn beat() {
    let _ = rustix::io::write(rustix::stdio::stdout(), b".");
}

/// Crash-only: what hangs in a driver cannot be given up by anything but the end of the process.
fn end_if_stuck(watchdog: &Watchdog) {
    let Some(text) = watchdog.stuck() else { return };
    tracing::error!("{text}: this process ends, and the supervisor starts another");
    // No handlers, no destructors, no core of the whole pool: each could hang as well.
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

/// Makes pool and device on a thread of its own, beating meanwhile.
async fn prepare(config: &Config, watchdog: &Watchdog) -> Result<device::Memory> {
    let (tell, mut told) = tokio::sync::oneshot::channel();
    let (config, dog) = (config.clone(), watchdog.clone());
    std::thread::Builder::new()
        .name("pillion-prepare".into())
        .spawn(move || drop(tell.send(device::prepare(&config, &dog))))
        .context("cannot start a thread")?;
    loop {
        tokio::select! {
            made = &mut told => return made.context("the preparation of the memory ended without a result")?,
            () = tokio::time::sleep(LOOK) => {
                beat();
                end_if_stuck(watchdog);
            }
        }
    }
}

async fn drain(driver: &SharedDriver, limit: Duration, watchdog: &Watchdog) {
    tracing::info!("draining for at most {} s", limit.as_secs());
    driver.borrow_mut().drain();
    let begun = Instant::now();
    while !driver.borrow().is_drained() && begun.elapsed() < limit {
        beat();
        end_if_stuck(watchdog);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    driver.borrow_mut().end_sessions();
    // Time for the last words.
    while driver.borrow().session_count() > 0 && begun.elapsed() < limit {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // What is sealed need not be scanned at the next start.
    let sealing = driver.borrow_mut().close_ssd();
    if let Some(sealing) = sealing {
        let left = limit.saturating_sub(begun.elapsed()).max(SEAL_MIN);
        let ended = async {
            tokio::pin!(sealing);
            while tokio::time::timeout(LOOK, &mut sealing).await.is_err() {
                beat();
            }
        };
        if tokio::time::timeout(left, ended).await.is_err() {
            tracing::warn!("the SSD did not end in time: the next start reads its open segments");
        }
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
}
