//! Tables and JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::study::{BASE, Cell, Results, SSD_BASE};

pub(crate) fn mean<T>(runs: &[T], value: impl Fn(&T) -> f64) -> f64 {
    runs.iter().map(value).sum::<f64>() / runs.len().max(1) as f64
}

/// In the order of their first appearance.
pub(crate) fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = Vec::new();
    for item in all {
        if !seen.contains(&item) {
            seen.push(item);
        }
    }
    seen
}

fn percent(thousandths: usize) -> String {
    format!("{} %", thousandths as f64 / 10.0)
}

fn row(out: &mut String, cells: impl IntoIterator<Item = String>) {
    let _ = writeln!(out, "| {} |", cells.into_iter().collect::<Vec<_>>().join(" | "));
}

fn rule(out: &mut String, columns: usize) {
    row(out, std::iter::once("---".to_owned()).chain((1..columns).map(|_| "---:".to_owned())));
}

fn of<'a, T>(
    cells: &'a [Cell<T>],
    trace: &str,
    pool: usize,
    ssd: usize,
    policy: &str,
) -> Option<&'a Cell<T>> {
    cells.iter().find(|c| c.trace == trace && c.policy == policy && (c.pool, c.ssd) == (pool, ssd))
}

/// All tables, in Markdown.
pub fn tables(results: &Results) -> String {
    let mut out = String::new();
    host_summary(&mut out, results);
    for workload in &results.workloads {
        let name = &workload.name;
        let _ = writeln!(
            out,
            "\n### {name}\n\n{} requests, {} blocks asked, {} distinct. Hit rate in %, by size of the pool in \
             shares of the distinct blocks.\n",
            workload.requests, workload.asked, workload.blocks
        );
        let cells: Vec<_> = results.host.iter().filter(|cell| cell.trace == *name).collect();
        let pools = distinct(cells.iter().map(|cell| cell.pool));
        row(&mut out, std::iter::once("pool".to_owned()).chain(pools.iter().map(|pool| percent(*pool))));
        rule(&mut out, pools.len() + 1);
        for policy in distinct(cells.iter().map(|cell| cell.policy)) {
            let rates = pools.iter().map(|pool| {
                let cell = of(&results.host, name, *pool, 0, policy);
                cell.map_or(String::new(), |cell| {
                    format!("{:.2}", 100.0 * mean(&cell.runs, |run| run.hit_rate()))
                })
            });
            row(&mut out, std::iter::once(policy.to_owned()).chain(rates));
        }
        ssd_table(&mut out, results, name);
    }
    ssd_summary(&mut out, results);
    out
}

/// Of all sizes: the mean hit rate, how much of the way from LRU over leaves to the ceiling, the worst loss.
fn host_summary(out: &mut String, results: &Results) {
    let _ = writeln!(
        out,
        "### Pool alone, all sizes\n\nMean hit rate in % by workload; then the mean over workloads, the largest gain \
         and the largest loss against \"{BASE}\" in any cell, in points.\n"
    );
    let names: Vec<_> = results.workloads.iter().map(|workload| workload.name.clone()).collect();
    for behind in [false, true] {
        let names: Vec<_> = names.iter().filter(|name| name.contains(", behind") == behind).collect();
        if behind {
            let _ = writeln!(out, "\nBehind an engine's own cache:\n");
        }
        let short = names.iter().map(|name| name.split(',').next().unwrap_or(name).to_owned());
        let ends = ["mean", "gain", "loss"].map(str::to_owned);
        row(out, std::iter::once("policy".to_owned()).chain(short).chain(ends.clone()));
        rule(out, names.len() + 4);
        for policy in distinct(results.host.iter().map(|cell| cell.policy)) {
            let (mut line, mut sum) = (vec![policy.to_owned()], 0.0);
            let (mut gain, mut loss) = (0f64, 0f64);
            for name in &names {
                let cells: Vec<_> =
                    results.host.iter().filter(|c| c.trace == **name && c.policy == policy).collect();
                let rate = |cell: &Cell<crate::host::Outcome>| 100.0 * mean(&cell.runs, |run| run.hit_rate());
                for cell in &cells {
                    let base = of(&results.host, name, cell.pool, 0, BASE).map_or(0.0, rate);
                    gain = gain.max(rate(cell) - base);
                    loss = loss.min(rate(cell) - base);
                }
                let all = cells.iter().map(|cell| rate(cell)).sum::<f64>() / cells.len().max(1) as f64;
                sum += all;
                line.push(format!("{all:.2}"));
            }
            line.push(format!("{:.2}", sum / names.len().max(1) as f64));
            line.extend([format!("+{gain:.1}"), format!("−{:.1}", loss.abs())]);
            row(out, line);
        }
    }
}

fn ssd_cells(cell: &Cell<crate::ssd::Outcome>) -> [f64; 4] {
    [
        100.0 * mean(&cell.runs, |run| run.hit_rate()),
        100.0 * mean(&cell.runs, |run| run.read as f64 / run.asked.max(1) as f64),
        mean(&cell.runs, |run| run.writes_per_asked()),
        mean(&cell.runs, |run| run.write_amplification()),
    ]
}

fn ssd_table(out: &mut String, results: &Results, name: &str) {
    let cells: Vec<_> = results.ssd.iter().filter(|cell| cell.trace == name).collect();
    if cells.is_empty() {
        return;
    }
    let _ = writeln!(
        out,
        "\nPool and SSD: hit rate in %; blocks written to the SSD per block asked; write amplification.\n"
    );
    let tiers = distinct(cells.iter().map(|cell| (cell.pool, cell.ssd)));
    let heads = tiers.iter().map(|(pool, ssd)| format!("{} + {}", percent(*pool), percent(*ssd)));
    row(out, std::iter::once("pool + SSD".to_owned()).chain(heads));
    rule(out, tiers.len() + 1);
    for policy in distinct(cells.iter().map(|cell| cell.policy)) {
        let values = tiers.iter().map(|(pool, ssd)| {
            let cell = of(&results.ssd, name, *pool, *ssd, policy).map(ssd_cells);
            cell.map_or(String::new(), |[rate, _, writes, amplification]| {
                format!("{rate:.2}; {writes:.2}; {amplification:.2}")
            })
        });
        row(out, std::iter::once(policy.to_owned()).chain(values));
    }
}

fn ssd_summary(out: &mut String, results: &Results) {
    let _ = writeln!(
        out,
        "\n### Pool and SSD, all workloads and sizes\n\nMeans; gain and loss of hit rate in any cell against \
         \"{SSD_BASE}\", in points.\n"
    );
    let heads = [
        "policy",
        "hit rate %",
        "read from SSD %",
        "writes per block asked",
        "write amplification",
        "gain",
        "loss",
    ];
    row(out, heads.map(str::to_owned));
    rule(out, heads.len());
    for policy in distinct(results.ssd.iter().map(|cell| cell.policy)) {
        let cells: Vec<_> = results.ssd.iter().filter(|cell| cell.policy == policy).collect();
        let at =
            |index: usize| cells.iter().map(|cell| ssd_cells(cell)[index]).sum::<f64>() / cells.len() as f64;
        let change = cells.iter().map(|cell| {
            let base = of(&results.ssd, &cell.trace, cell.pool, cell.ssd, SSD_BASE);
            ssd_cells(cell)[0] - base.map_or(0.0, |base| ssd_cells(base)[0])
        });
        let (gain, loss) = change.fold((0f64, 0f64), |(gain, loss), by| (gain.max(by), loss.min(by)));
        row(
            out,
            [
                policy.to_owned(),
                format!("{:.2}", at(0)),
                format!("{:.2}", at(1)),
                format!("{:.3}", at(2)),
                format!("{:.2}", at(3)),
                format!("+{gain:.1}"),
                format!("−{:.1}", loss.abs()),
            ],
        );
    }
}

/// What it ran on. Nothing that names the machine; the figures do not depend on it.
pub fn machine() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model =
        info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    json!({
        "cpu": model.unwrap_or("unknown"),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease").trim().split('-').next(),
        "note": "a simulation: the figures do not depend on the machine",
    })
}

fn rounded(value: f64) -> Value {
    json!((value * 1e5).round() / 1e5)
}

fn json_row(case: String, policy: (&str, &[f64]), peer: (&str, &[f64])) -> Value {
    let ratio = |(ours, theirs): (&f64, &f64)| if *theirs > 0.0 { ours / theirs } else { 1.0 };
    let ratios: Vec<f64> = policy.1.iter().zip(peer.1).map(ratio).collect();
    let (ours, theirs) = (mean(policy.1, |rate| *rate), mean(peer.1, |rate| *rate));
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    json!({
        "metric": "policy", "case": case, "ours": rounded(ours), "peer": peer.0, "theirs": rounded(theirs),
        "unit": "hit rate", "ratio": rounded(ratio((&ours, &theirs))), "budget": null, "met": null,
        "runs": ratios.len(), "spread": [rounded(least), rounded(most)], "policy": policy.0,
    })
}

/// The form of every benchmark's results, and a line for each row, so that a change can be read. `ours` is the
/// row's policy, the peer the one that was there first.
pub fn json(results: &Results, machine: &Value, commit: &str) -> String {
    let mut rows = Vec::new();
    for cell in &results.host {
        let Some(base) = of(&results.host, &cell.trace, cell.pool, 0, BASE) else { continue };
        let rates = |cell: &Cell<crate::host::Outcome>| {
            cell.runs.iter().map(|run| run.hit_rate()).collect::<Vec<_>>()
        };
        let case = format!("{}, pool {}", cell.trace, percent(cell.pool));
        rows.push(json_row(case, (cell.policy, &rates(cell)), (BASE, &rates(base))));
    }
    for cell in &results.ssd {
        let Some(base) = of(&results.ssd, &cell.trace, cell.pool, cell.ssd, SSD_BASE) else { continue };
        let rates =
            |cell: &Cell<crate::ssd::Outcome>| cell.runs.iter().map(|run| run.hit_rate()).collect::<Vec<_>>();
        let case = format!("{}, pool {}, SSD {}", cell.trace, percent(cell.pool), percent(cell.ssd));
        let mut row = json_row(case, (cell.policy, &rates(cell)), (SSD_BASE, &rates(base)));
        let [_, read, writes, amplification] = ssd_cells(cell);
        row["read_per_asked"] = rounded(read / 100.0);
        row["writes_per_asked"] = rounded(writes);
        row["write_amplification"] = rounded(amplification);
        rows.push(row);
    }
    let rows: Vec<String> = rows.iter().map(Value::to_string).collect();
    format!(
        "{{\"machine\": {machine}, \"commit\": {}, \"rows\": [\n{}\n]}}\n",
        json!(commit),
        rows.join(",\n")
    )
}
