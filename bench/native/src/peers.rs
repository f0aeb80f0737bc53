//! What we are compared with, each in a process of its own: fio, and what `scripts/bench` could install.

use std::{path::Path, process::Command};

use serde_json::Value;

use crate::rig::Outcome;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Read,
    Write,
}

impl Way {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// One run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) gbps: f64,
    pub(crate) cpu_s_per_gb: f64,
}

/// What is moved, by everybody in the same way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) way: Way,
    pub(crate) bytes: u64,
    pub(crate) depth: u64,
    pub(crate) seconds: f64,
    /// Of the file, or what there is of records.
    pub(crate) total: u64,
}

/// A peer that takes longer has come to no end.
const PEER_SECONDS_MAX: &str = "120";

fn output(command: &Command) -> Outcome<Value> {
    let name =
        Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut bounded = Command::new("timeout");
    bounded.arg(PEER_SECONDS_MAX).arg(command.get_program()).args(command.get_args());
    let output = bounded.output().map_err(|error| format!("{name}: {error}"))?;
    if output.status.code() == Some(124) {
        return Err(format!("{name} was not done after {PEER_SECONDS_MAX} s").into());
    }
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing said");
        return Err(format!("{name} ended with {}: {last}", output.status).into());
    }
    // Some say more before their JSON.
    let text = String::from_utf8_lossy(&output.stdout);
    let begin = text.find('{').ok_or_else(|| format!("{name} printed no JSON"))?;
    Ok(serde_json::from_str(&text[begin..])?)
}

fn fio_command(directory: &Path, load: &Load, huge_pages: bool) -> Command {
    let mut command = Command::new("fio");
    command
        .args(["--output-format=json", "--ioengine=io_uring", "--direct=1", "--thread=1", "--overwrite=1"])
        .arg(format!("--filename={}", directory.join("fio.dat").display()))
        .arg(format!("--size={}", load.total))
        .args(["--time_based=1".to_owned(), format!("--runtime={}ms", (load.seconds * 1e3) as u64)]);
    if huge_pages {
        // Its memory is of the same kind as ours: a request ends where its memory is in too many places.
        command.arg("--mem=mmaphuge");
    }
    command
}

/// Makes fio's file, with all its blocks written.
pub(crate) fn fio_lay_out(directory: &Path, total: u64) -> Outcome<()> {
    let mut command = Command::new("fio");
    command
        .args(["--output-format=json", "--name=fill", "--rw=write", "--bs=2m", "--iodepth=16"])
        .args(["--ioengine=io_uring", "--direct=1", "--end_fsync=1"])
        .arg(format!("--filename={}", directory.join("fio.dat").display()))
        .arg(format!("--size={total}"));
    output(&command).map(drop)
}

fn number(value: &Value, pointer: &str) -> Outcome<f64> {
    Ok(value
        .pointer(pointer)
        .and_then(Value::as_f64)
        .ok_or_else(|| format!("fio's JSON has no {pointer}"))?)
}

/// `sync_every`: so many writes are followed by an `fdatasync`; 0: none.
pub(crate) fn fio(directory: &Path, load: &Load, huge_pages: bool, sync_every: u64) -> Outcome<Sample> {
    let mut command = fio_command(directory, load, huge_pages);
    if sync_every > 0 {
        command.arg(format!("--fdatasync={sync_every}"));
    }
    command
        .arg("--name=case")
        .arg(format!("--rw={}", load.way.name()))
        .arg(format!("--bs={}", load.bytes))
        .arg(format!("--iodepth={}", load.depth));
    let value = output(&command)?;
    let job = value.pointer("/jobs/0").ok_or("fio's JSON has no job")?;
    let of = |name: &str| number(job, &format!("/{}/{name}", load.way.name()));
    let (bytes, seconds) = (of("io_bytes")?, of("runtime")? / 1e3);
    let cpu = (number(job, "/usr_cpu")? + number(job, "/sys_cpu")?) / 100.0 * seconds;
    Ok(Sample { gbps: of("bw_bytes")? / 1e9, cpu_s_per_gb: cpu / (bytes / 1e9) })
}

/// p99 in ms of single reads, alone and with writes beside them.
pub(crate) fn fio_p99(directory: &Path, load: &Load, writers: u64, huge_pages: bool) -> Outcome<f64> {
    let mut command = fio_command(directory, load, huge_pages);
    command
        .arg(format!("--bs={}", load.bytes))
        .args(["--name=reads", "--rw=read"])
        .arg(format!("--iodepth={}", load.depth));
    if writers > 0 {
        command.args(["--name=writes", "--rw=write"]).arg(format!("--iodepth={writers}"));
    }
    let value = output(&command)?;
    let job = value.pointer("/jobs/0/read/clat_ns/percentile").ok_or("fio's JSON has no percentiles")?;
    Ok(job.get("99.000000").and_then(Value::as_f64).ok_or("fio's JSON has no p99")? / 1e6)
}

/// A peer that speaks our small protocol, or why it is not there.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) name: &'static str,
    command: Result<Vec<String>, String>,
}

impl Peer {
    /// As `scripts/bench` found it: the command in a variable, one word a line, or `!` and why there is none.
    pub(crate) fn of_variable(name: &'static str, variable: &str) -> Self {
        let text = std::env::var(variable).unwrap_or_else(|_| "!not set up by scripts/bench".to_owned());
        let command = match text.strip_prefix('!') {
            Some(why) => Err(why.to_owned()),
            None => Ok(text.lines().map(str::to_owned).collect()),
        };
        Self { name, command }
    }

    /// A program that is on every machine of ours.
    pub(crate) fn of_command(name: &'static str, words: &[&str]) -> Self {
        Self { name, command: Ok(words.iter().map(|&word| word.to_owned()).collect()) }
    }

    /// What it prints.
    pub(crate) fn ask(&self, more: &[String]) -> Result<Value, String> {
        let words = self.command.as_ref().map_err(Clone::clone)?;
        let (program, arguments) = words.split_first().ok_or("an empty command")?;
        let mut command = Command::new(program);
        command.args(arguments).args(more);
        output(&command).map_err(|error| error.to_string())
    }

    pub(crate) fn run(&self, directory: &Path, load: &Load) -> Result<Sample, String> {
        let mut words = vec![load.way.name().to_owned(), "--dir".to_owned(), directory.display().to_string()];
        let numbers = [("--bytes", load.bytes), ("--depth", load.depth), ("--total", load.total)];
        for (name, number) in numbers {
            words.extend([name.to_owned(), number.to_string()]);
        }
        words.extend(["--seconds".to_owned(), load.seconds.to_string()]);
        let value = self.ask(&words)?;
        let of = |name: &str| value.get(name).and_then(Value::as_f64).ok_or("no figures");
        Ok(Sample { gbps: of("gbps")?, cpu_s_per_gb: of("cpu_s_per_gb")? })
    }
}
