//! Every target on its committed corpus, and on a short course from a fixed seed.

use std::{
    collections::BTreeSet,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use pillion_fuzz::{TARGETS, Target};

/// Of one target's corpus: more is a job for `scripts/soak fuzz`.
const FILES_MAX: usize = 60;
const BYTES_MAX: u64 = 100 << 10;
/// Of the course: as many inputs as fit.
const COURSE: Duration = Duration::from_millis(700);
const COURSE_INPUTS: u32 = 2000;

fn corpora() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

fn corpus(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let place = corpora().join(target.name);
    let entries = fs::read_dir(&place).unwrap_or_else(|error| panic!("{}: {error}", place.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(&path).expect("an input"))).collect()
}

/// Runs one input; says which one it was where it fails.
fn run(target: &Target, input: &[u8], which: &str) {
    if catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_err() {
        panic!("{} fails on {which}: {}", target.name, input.escape_ascii());
    }
}

/// xorshift64*.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.roll() % bound.max(1) as u64) as usize
    }

    /// An input of the corpus with some changes, or noise.
    fn input(&mut self, corpus: &[(PathBuf, Vec<u8>)]) -> Vec<u8> {
        let mut input =
            if self.below(4) == 0 { Vec::new() } else { corpus[self.below(corpus.len())].1.clone() };
        if input.is_empty() {
            return (0..self.below(300)).map(|_| self.roll() as u8).collect();
        }
        for _ in 0..1 + self.below(4) {
            let at = self.below(input.len());
            match self.below(4) {
                0 => input.insert(at, self.roll() as u8),
                1 if input.len() > 1 => drop(input.remove(at)),
                2 => input.truncate(at.max(1)),
                _ => input[at] = self.roll() as u8,
            }
        }
        input
    }
}

fn replay(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target");
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "{name} has no corpus");
    let bytes: u64 = corpus.iter().map(|(_, input)| input.len() as u64).sum();
    assert!(corpus.len() <= FILES_MAX && bytes <= BYTES_MAX, "{name}: {} files, {bytes} bytes", corpus.len());
    for (path, input) in &corpus {
        run(target, input, &path.display().to_string());
    }
    let (mut dice, begun, mut count) = (Dice(0x9e37_79b9_7f4a_7c15), Instant::now(), 0);
    while count < COURSE_INPUTS && begun.elapsed() < COURSE {
        let input = dice.input(&corpus);
        run(target, &input, &format!("input {count} of the course"));
        count += 1;
    }
    println!("{name}: {} files ({bytes} bytes) replayed, {count} inputs of the course", corpus.len());
}

macro_rules! replays {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            replay(stringify!($name));
        })*

        #[test]
        fn every_target_is_replayed_and_every_corpus_has_a_target() {
            let replayed = BTreeSet::from([$(stringify!($name).to_owned()),*]);
            let targets: BTreeSet<_> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
            assert_eq!(replayed, targets);
            let names = fs::read_dir(corpora()).expect("corpora");
            let names = names.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
            assert_eq!(names.collect::<BTreeSet<_>>(), targets);
            let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("cargo-fuzz/Cargo.toml"));
            let manifest = manifest.expect("the manifest of the binaries");
            for name in &targets {
                assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} has no binary");
            }
        }
    };
}

replays! {
    frames message ssd_format ssd_recovery packing layout registration core_events shm config http client attach
}
