//! Measures and torments the SSD tier, and measures the index. Run by `scripts/bench` and `scripts/soak`.
#![deny(unsafe_code)]

mod child;
mod index;
mod peers;
mod recovery;
mod report;
mod rig;
mod soak;
mod throughput;

use std::{path::PathBuf, process::ExitCode};

use rig::Outcome;

const USAGE: &str = "\
usage: pillion-bench ssd [--dir DIR] [--json FILE] [--quick] [--only TEXT]
       pillion-bench recovery [--dir DIR] [--json FILE] [--quick]
       pillion-bench index [--json FILE] [--quick]
       pillion-bench soak-kill --runs N [--seed S] [--dir DIR] [--json FILE]
ends with 0: all budgets met, nothing wrong; 1: missed or wrong; 2: usage";

/// What was asked for.
#[derive(Debug, Default)]
struct Options {
    dir: PathBuf,
    json: Option<PathBuf>,
    quick: bool,
    only: String,
    runs: u64,
    seed: u64,
}

fn options(mut arguments: impl Iterator<Item = String>) -> Option<Options> {
    let mut options = Options { dir: "target".into(), seed: 1, ..Options::default() };
    while let Some(flag) = arguments.next() {
        match flag.as_str() {
            "--quick" => options.quick = true,
            "--only" => options.only = arguments.next()?,
            "--dir" => options.dir = arguments.next()?.into(),
            "--json" => options.json = Some(arguments.next()?.into()),
            "--runs" => options.runs = arguments.next()?.parse().ok()?,
            "--seed" => options.seed = arguments.next()?.parse().ok()?,
            _ => return None,
        }
    }
    Some(options)
}

fn run() -> Outcome<Option<bool>> {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    match name.as_str() {
        // Started by the others, for a process to kill and one whose memory is looked at.
        "child" => return child::run(arguments).map(|()| Some(true)),
        "recover-once" => return recovery::once(arguments).map(|()| Some(true)),
        _ => {}
    }
    let Some(options) = options(arguments) else { return Ok(None) };
    match name.as_str() {
        "ssd" => {
            throughput::run(&options.dir, options.json.as_deref(), options.quick, &options.only).map(Some)
        }
        "recovery" => recovery::run(&options.dir, options.json.as_deref(), options.quick).map(Some),
        "index" => index::run(options.json.as_deref(), options.quick).map(Some),
        "soak-kill" if options.runs > 0 => {
            soak::run(&options.dir, options.json.as_deref(), options.runs, options.seed).map(Some)
        }
        _ => Ok(None),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(Some(true)) => ExitCode::SUCCESS,
        Ok(Some(false)) => ExitCode::FAILURE,
        Ok(None) => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
