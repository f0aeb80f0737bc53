//! The simulator's command: a campaign, or one seed again.

use std::{fs, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context, Result};
use clap::Parser;
use pillion_simulator::{Budget, Campaign, Fault, run, shrink};
use serde_json::{Value, json};

/// Failures after which a campaign ends: one bug is met again and again.
const FAILURES_MAX: usize = 20;

/// The sidecar's decisions and its SSD store under a seeded scheduler, with everything that may go wrong.
#[derive(Debug, Parser)]
struct Args {
    /// Scenarios to play.
    #[arg(long, default_value_t = 10_000)]
    scenarios: u64,
    /// Another course.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the report there, too.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Play the scenario of this seed again, and say everything that happens in it.
    #[arg(long)]
    replay: Option<u64>,
    /// Count on what is acknowledged after a failed sync and a restart, too: known not to hold.
    #[arg(long)]
    strict_syncs: bool,
    /// End after so many minutes, however many scenarios have been played.
    #[arg(long)]
    minutes: Option<f64>,
    /// Lines of a trace that are printed, from its end.
    #[arg(long, default_value_t = 400)]
    lines: usize,
}

impl Args {
    fn budget(&self) -> Budget {
        Budget { strict_syncs: self.strict_syncs, ..Budget::default() }
    }
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    match args.replay {
        Some(seed) => Ok(replay(seed, &args)),
        None => campaign(&args),
    }
}

fn commit() -> String {
    std::env::var("PILLION_COMMIT").unwrap_or_else(|_| "unknown".into())
}

fn replay(seed: u64, args: &Args) -> ExitCode {
    let played = run(seed, &args.budget(), None, true);
    print_trace(&played.trace, args.lines);
    match played.violation {
        Some(violation) => {
            println!("{}: {}", violation.invariant, violation.text);
            explain(seed, args);
            ExitCode::FAILURE
        }
        None => {
            println!("seed={seed}: nothing is broken; {} events, trace {:016x}", played.events, played.hash);
            ExitCode::SUCCESS
        }
    }
}

fn print_trace(trace: &[(u64, String)], lines: usize) {
    let skipped = trace.len().saturating_sub(lines);
    if skipped > 0 {
        println!("… {skipped} lines …");
    }
    for (now, line) in &trace[skipped..] {
        println!("{:>10.3} ms  {line}", *now as f64 / 1e6);
    }
}

/// The smallest scenario of a seed that still fails.
fn explain(seed: u64, args: &Args) {
    println!("seed={seed} commit={}", commit());
    let Some((budget, outcome)) = shrink(seed, &args.budget(), None) else { return };
    let faults: Vec<_> = Fault::ALL.iter().zip(&outcome.faults).filter(|(_, count)| **count > 0).collect();
    print_trace(&outcome.trace, args.lines);
    println!("smallest: {budget:?}");
    println!(
        "faults that happen in it: {:?}",
        faults.iter().map(|(fault, count)| (fault.name(), count)).collect::<Vec<_>>()
    );
    if let Some(violation) = outcome.violation {
        println!("{}: {}", violation.invariant, violation.text);
    }
}

fn campaign(args: &Args) -> Result<ExitCode> {
    let (machine, begun) = (machine(), Instant::now());
    let told = |done: u64| {
        if done.is_multiple_of(50_000) {
            eprintln!("{done} scenarios, {:.0} s", begun.elapsed().as_secs_f64());
        }
        args.minutes.is_none_or(|most| begun.elapsed().as_secs_f64() < most * 60.0)
    };
    let campaign = Campaign::play(args.seed, args.scenarios, &args.budget(), None, FAILURES_MAX, told);
    let seconds = begun.elapsed().as_secs_f64();
    let mut report = json!({
        "campaign": "sim",
        "commit": commit(),
        "machine": machine,
        "seed": args.seed,
        "seconds": seconds.round(),
        "seconds_of_cpu": cpu_seconds().round(),
        "scenarios_per_minute": (campaign.scenarios as f64 / seconds * 60.0).round(),
        "scenarios_per_minute_of_cpu": (campaign.scenarios as f64 / cpu_seconds() * 60.0).round(),
    });
    if let (Value::Object(report), Value::Object(found)) = (&mut report, campaign.json()) {
        report.extend(found);
    }
    let text = serde_json::to_string_pretty(&report)? + "\n";
    print!("{text}");
    if let Some(path) = &args.json {
        fs::write(path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(failure) = campaign.failures.first() {
        explain(failure.seed, args);
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// What this process has had: on a machine that others use, too, the clock on the wall says little.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let ns = stat.split(' ').next().and_then(|ns| ns.parse::<u64>().ok());
    ns.map_or(f64::NAN, |ns| ns as f64 / 1e9)
}

/// The machine, without names.
fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let cpu =
        cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    json!({
        "cpu": cpu,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "cores_used": 1,
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_before": read("/proc/loadavg").split(' ').next(),
    })
}
