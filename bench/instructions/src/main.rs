//! The calls of the client that an engine's own threads make, each in a function of its own whose instructions callgrind
//! counts: `scripts/bench instructions` runs this under valgrind against a real sidecar.
//!
//! usage: pillion-instructions SOCKET NAME

use std::{
    env,
    fs::File,
    hint::black_box,
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use pillion_client::{Memory, Options, Registration, SaveJob, SaveRun, SchedulerClient, WorkerClient};
use pillion_layouts::{
    Worker, canary_fill,
    vllm::{
        KvCacheTensor,
        groups::{Group, Pages},
    },
};
use pillion_shm::{Memfd, Seal};

const BLOCKS: usize = 2048;
const PAGE: u64 = 4096;
const SUBMITTED: usize = 256;
const PATIENCE: Duration = Duration::from_secs(60);
const CANARY: u64 = 7;

/// Counted: finding 2,048 blocks in the presence table.
#[inline(never)]
fn count_lookup(client: &SchedulerClient, hashes: &[u8]) -> usize {
    client.lookup(0, hashes)
}

/// Counted: finding out which of 2,048 blocks are to be saved, when all of them are there.
#[inline(never)]
fn count_absent(client: &SchedulerClient, hashes: &[u8]) -> usize {
    client.absent(0, hashes).len()
}

/// Counted: submitting a save of 256 blocks.
#[inline(never)]
fn count_submit(client: &WorkerClient, job: SaveJob) {
    client.submit_save(job);
}

/// Counted: what every step asks, with nothing to do.
#[inline(never)]
fn count_step(scheduler: &SchedulerClient, worker: &WorkerClient) -> usize {
    black_box(scheduler.ready());
    worker.poll().len()
}

/// Spread as sha256 is.
fn hashes(first: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count * 32];
    for (index, hash) in bytes.chunks_exact_mut(32).enumerate() {
        canary_fill(1_000_000 * first + index as u64 * 4, hash);
    }
    bytes
}

struct Engine {
    scheduler: SchedulerClient,
    worker: WorkerClient,
    jobs: u8,
}

impl Engine {
    fn attach(socket: PathBuf) -> Result<Self> {
        let options = || Options {
            socket: socket.clone(),
            engine_id: "instructions".into(),
            tenant: "default".into(),
            namespaces: vec![vec![("model".into(), "instructions".into())]],
            launch: Vec::new(),
            grace: PATIENCE,
        };
        let (scheduler, worker) = (SchedulerClient::new(options())?, WorkerClient::new(options())?);
        worker.register(registration()?, 1)?;
        let engine = Self { scheduler, worker, jobs: 0 };
        engine.until("attach", || engine.scheduler.ready() && engine.worker.ready())?;
        Ok(engine)
    }

    fn until(&self, what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
        let begun = Instant::now();
        while !done() {
            ensure!(
                begun.elapsed() < PATIENCE,
                "waited in vain to {what}: scheduler {}, worker {}",
                self.scheduler.status(),
                self.worker.status()
            );
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn job(&mut self, hashes: Vec<u8>) -> Result<SaveJob> {
        self.jobs += 1;
        let spaces = self.scheduler.namespace_ids().context("no namespace is open")?;
        let count = hashes.len() / 32;
        Ok(SaveJob {
            job: [self.jobs; 16],
            runs: vec![SaveRun { space: spaces[0], parent: None, count: count as u32 }],
            hashes,
            blocks: (0..count as u32).collect(),
            deadline: PATIENCE,
            stream: None,
        })
    }

    fn save(&mut self, hashes: Vec<u8>) -> Result<()> {
        let job = self.job(hashes)?;
        self.worker.submit_save(job);
        self.until("save", || self.worker.poll().iter().any(|event| event.quiesced))
    }
}

fn registration() -> Result<Registration> {
    let bytes = BLOCKS as u64 * PAGE;
    let memfd = Memfd::create("instructions", bytes)?;
    let file = File::from(memfd.fd().try_clone_to_owned()?);
    let mut canary = vec![0; PAGE as usize];
    canary_fill(CANARY, &mut canary);
    file.write_all_at(&canary, 0)?;
    memfd.seal(Seal::Size)?;
    let tensor = KvCacheTensor {
        size: bytes,
        offset: 0,
        layer_stride: bytes,
        block_stride: PAGE,
        layers: vec!["l".into()],
    };
    let pages = Pages {
        tensor,
        heads: 1,
        states: 16,
        content_bytes: 256,
        page_bytes: PAGE,
        kernel_blocks: 1,
        packing: "kv total_heads=1 key=128 value=128 dtype=float32".parse()?,
    };
    let worker = Worker {
        order: "LBHNC".into(),
        num_blocks: BLOCKS as u64,
        memory_bytes: bytes,
        rank: 0,
        world: 1,
        groups: vec![Group { block_tokens: 16, pages: vec![pages] }],
    };
    let mut registration = Registration::new(worker, Vec::new(), Memory::Memfd(OwnedFd::from(file)))?;
    registration.check_canary(0, CANARY)?;
    Ok(registration)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [socket, name] = arguments.as_slice() else { bail!("usage: pillion-instructions SOCKET NAME") };
    let mut engine = Engine::attach(socket.into())?;
    match name.as_str() {
        "lookup-2048" | "absent-2048" => {
            let known = hashes(1, BLOCKS);
            engine.save(known.clone())?;
            engine.until("find", || engine.scheduler.lookup(0, &known) == BLOCKS)?;
            let right = match name.as_str() {
                "lookup-2048" => count_lookup(&engine.scheduler, &known) == BLOCKS,
                _ => count_absent(&engine.scheduler, &known) == 0,
            };
            ensure!(right, "the table went stale meanwhile");
        }
        "submit-256" => {
            let job = engine.job(hashes(3, SUBMITTED))?;
            count_submit(&engine.worker, job);
            engine.until("save", || engine.worker.poll().iter().any(|event| event.quiesced))?;
        }
        "idle-step" => ensure!(count_step(&engine.scheduler, &engine.worker) == 0, "expected nothing"),
        other => bail!("expected lookup-2048, absent-2048, submit-256 or idle-step, got {other}"),
    }
    engine.scheduler.close();
    engine.worker.close();
    Ok(())
}
