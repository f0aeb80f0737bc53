//! Rows of measurements: as a table for people, as JSON for everything else.

use std::{fs, path::Path};

use serde::Serialize;
use serde_json::{Value, json};

use crate::rig::Outcome;

/// One figure beside another one of the same run. A ratio of 1 or more means that ours is better.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) metric: &'static str,
    pub(crate) case: String,
    pub(crate) ours: Option<f64>,
    pub(crate) peer: String,
    pub(crate) theirs: Option<f64>,
    pub(crate) unit: &'static str,
    pub(crate) ratio: Option<f64>,
    pub(crate) budget: Option<f64>,
    pub(crate) met: Option<bool>,
    pub(crate) runs: usize,
    pub(crate) spread: Option<[f64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
}

/// Whether more or less of a unit is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    More,
    Less,
}

pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        count if count % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

impl Row {
    /// Of pairs (ours, theirs) from interleaved runs: the median of each, and of the ratios of neighbours.
    pub(crate) fn of(
        metric: &'static str,
        case: impl Into<String>,
        peer: &str,
        unit: &'static str,
        better: Better,
        budget: Option<f64>,
        pairs: &[(f64, f64)],
    ) -> Self {
        let ratios: Vec<f64> = pairs
            .iter()
            .map(|(ours, theirs)| if better == Better::More { ours / theirs } else { theirs / ours })
            .collect();
        let of = |side: fn(&(f64, f64)) -> f64| median(&pairs.iter().map(side).collect::<Vec<_>>());
        let ratio = median(&ratios);
        let bounds = ratios
            .iter()
            .fold([f64::INFINITY, 0.0_f64], |[low, high], ratio| [low.min(*ratio), high.max(*ratio)]);
        Self {
            metric,
            case: case.into(),
            ours: of(|pair| pair.0).map(round),
            peer: peer.to_owned(),
            theirs: of(|pair| pair.1).map(round),
            unit,
            ratio: ratio.map(round),
            budget,
            met: ratio.zip(budget).map(|(ratio, budget)| ratio >= budget),
            runs: pairs.len(),
            spread: (!pairs.is_empty()).then(|| bounds.map(round)),
            note: None,
        }
    }

    /// A peer that cannot be measured here.
    pub(crate) fn without(metric: &'static str, case: impl Into<String>, peer: &str, why: &str) -> Self {
        let note = Some(format!("peer not available: {why}"));
        Self { note, ..Self::of(metric, case, peer, "GB/s", Better::More, None, &[]) }
    }

    pub(crate) fn print(&self) {
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
        let spread = self.spread.map_or(String::new(), |[low, high]| format!("{low:.2}–{high:.2}"));
        let verdict = match self.met {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        };
        println!(
            "{:<4} {:<44} {:>10} {:>10} {:<9} {:>6} {:<10} {:<14} {} {}",
            self.metric,
            self.case,
            number(self.ours),
            number(self.theirs),
            self.unit,
            number(self.ratio),
            spread,
            self.peer,
            verdict,
            self.note.as_deref().unwrap_or_default()
        );
    }
}

fn word(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split(':').nth(1)?.trim().to_owned())
}

/// The machine, without names of hosts and paths.
pub(crate) fn machine(directory: &Path) -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let memory_kib: u64 = word(&read("/proc/meminfo"), "MemTotal")
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .unwrap_or(0);
    let (device, kind) = mount_of(directory);
    let name = device.rsplit('/').next().unwrap_or_default();
    let model = read(&format!("/sys/block/{name}/device/model"));
    let model = if model.is_empty() && name.starts_with("vd") { "virtio".into() } else { model };
    json!({
        "cpu": word(&read("/proc/cpuinfo"), "model name"),
        "cores": cpus,
        "memory_gib": memory_kib >> 20,
        "kernel": read("/proc/sys/kernel/osrelease").split('-').next(),
        "file_system": kind,
        "disk": model.trim(),
        "scheduler": read(&format!("/sys/block/{name}/queue/scheduler")).trim(),
        "huge_pages_free": word(&read("/proc/meminfo"), "HugePages_Free"),
        "load_before": read("/proc/loadavg").split(' ').next(),
    })
}

/// Device and file system of the longest mount point above a directory.
fn mount_of(directory: &Path) -> (String, String) {
    let directory = directory.canonicalize().unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let fields = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        Some((fields.next()?, fields.next()?, fields.next()?))
    });
    let above = fields.filter(|(_, at, _)| directory.starts_with(at)).max_by_key(|(_, at, _)| at.len());
    above.map_or_else(Default::default, |(device, _, kind)| (device.to_owned(), kind.to_owned()))
}

/// Prints and writes; whether every budget is met.
pub(crate) fn publish(machine: &Value, rows: &[Row], json: Option<&Path>) -> Outcome<bool> {
    println!(
        "\n{:<4} {:<44} {:>10} {:>10} {:<9} {:>6} {:<10} peer",
        "", "case", "ours", "theirs", "unit", "ratio", "spread"
    );
    rows.iter().for_each(Row::print);
    write(json, &json!({ "machine": machine, "commit": commit(), "rows": rows }))?;
    Ok(rows.iter().all(|row| row.met != Some(false)))
}

pub(crate) fn commit() -> String {
    std::env::var("PILLION_COMMIT").unwrap_or_else(|_| "unknown".to_owned())
}

pub(crate) fn write(path: Option<&Path>, value: &Value) -> Outcome<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(())
}
