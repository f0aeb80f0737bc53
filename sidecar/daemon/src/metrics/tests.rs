use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::*;

fn metrics() -> Metrics {
    Metrics::new("1.2.3", UNIX_EPOCH + Duration::from_millis(1_500))
}

fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{series} is missing in\n{text}")).parse().unwrap()
}

#[test]
fn every_series_exists_from_the_start_and_none_is_added() {
    let metrics = metrics();
    let before = metrics.encode();
    let count = |text: &str| text.lines().filter(|line| !line.starts_with('#')).count();
    for direction in Direction::ALL {
        for outcome in Outcome::ALL {
            metrics.job_finished(*direction, *outcome, 1, Duration::from_micros(15));
        }
        for path in Path::ALL {
            metrics.copy_finished(*direction, *path, Duration::ZERO);
        }
    }
    Refusal::ALL.iter().for_each(|reason| metrics.refused(*reason));
    metrics.set_core(&CoreCounters { records: 1, ..CoreCounters::default() });
    assert_eq!(count(&before), count(&metrics.encode()));
    assert!(count(&before) < 500, "{}", count(&before));
    assert!(before.ends_with("# EOF\n"));
}

#[test]
fn totals_are_taken_over_as_they_are() {
    let metrics = metrics();
    let now = CoreCounters {
        record_bytes: u64::MAX,
        lease_blocks_asked: 10,
        lease_blocks_hit: 7,
        loads_done: 3,
        bytes_loaded: 4096,
        worker_sessions: 2,
        workers: [0, 1, 0, 0],
        worker_restarts: 5,
        ssd: SsdCounters { blocks_read: 5, leases_waited: 3, leases_cut_short: 1, ..SsdCounters::default() },
        ..CoreCounters::default()
    };
    metrics.set_core(&now);
    metrics.set_core(&now);
    let text = metrics.encode();
    for (series, expected) in [
        ("pillion_lookup_blocks_total{outcome=\"hit\"}", 7.0),
        ("pillion_lookup_blocks_total{outcome=\"miss\"}", 3.0),
        ("pillion_jobs_total{direction=\"load\",outcome=\"done\"}", 3.0),
        ("pillion_jobs_total{direction=\"save\",outcome=\"done\"}", 0.0),
        ("pillion_transferred_bytes_total{direction=\"load\"}", 4096.0),
        ("pillion_used_bytes{tier=\"host\"}", i64::MAX as f64),
        ("pillion_used_bytes{tier=\"ssd\"}", 0.0),
        ("pillion_ssd_blocks_total{access=\"read\"}", 5.0),
        ("pillion_lease_waits_total{outcome=\"whole\"}", 2.0),
        ("pillion_sessions{role=\"worker\"}", 2.0),
        ("pillion_workers{path=\"process_vm\"}", 1.0),
        ("pillion_worker_restarts_total", 5.0),
        ("pillion_build_info{version=\"1.2.3\"}", 1.0),
        ("pillion_generation_start_time_seconds", 1.5),
    ] {
        assert_eq!(value(&text, series), expected, "{series}");
    }
}

#[test]
fn totals_never_go_back_and_levels_do() {
    let metrics = metrics();
    metrics.set_core(&CoreCounters { evictions: 9, records: 9, ..CoreCounters::default() });
    metrics.set_core(&CoreCounters { evictions: 3, records: 3, ..CoreCounters::default() });
    let text = metrics.encode();
    assert_eq!(value(&text, "pillion_evicted_blocks_total{tier=\"host\"}"), 9.0);
    assert_eq!(value(&text, "pillion_records{tier=\"host\"}"), 3.0);
}

#[test]
fn histograms_start_at_ten_microseconds() {
    let metrics = metrics();
    metrics.lease_answered(Duration::from_micros(10));
    metrics.lease_answered(Duration::from_micros(11));
    metrics.lease_answered(Duration::from_secs(51));
    let text = metrics.encode();
    assert_eq!(value(&text, "pillion_lease_seconds_bucket{le=\"0.00001\"}"), 1.0);
    assert_eq!(value(&text, "pillion_lease_seconds_bucket{le=\"0.00002\"}"), 2.0);
    assert_eq!(value(&text, "pillion_lease_seconds_bucket{le=\"50.0\"}"), 2.0);
    assert_eq!(value(&text, "pillion_lease_seconds_bucket{le=\"+Inf\"}"), 3.0);
    assert!(SECONDS.is_sorted() && BYTES.is_sorted());
}

#[test]
fn label_values_know_their_place() {
    fn check<L: LabelValue>() {
        for (index, value) in L::ALL.iter().enumerate() {
            assert_eq!(value.index(), index);
            assert!(value.text().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'));
        }
    }
    check::<Direction>();
    check::<Outcome>();
    check::<Path>();
    check::<Tier>();
    check::<Role>();
    check::<Lookup>();
    check::<LeaseOutcome>();
    check::<Skip>();
    check::<Access>();
    check::<Waited>();
    check::<Refusal>();
}

/// One row of docs/METRICS.md, from the text that a scraper gets.
#[derive(Default)]
struct Row {
    kind: String,
    unit: String,
    help: String,
    labels: BTreeMap<String, BTreeSet<String>>,
}

fn documented(text: &str) -> String {
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        if let ("#", Some(what), Some(name), Some(rest)) =
            (words.next().unwrap_or(""), words.next(), words.next(), words.next())
        {
            let row = rows.entry(name.to_owned()).or_default();
            match what {
                "HELP" => row.help = rest.to_owned(),
                "TYPE" => row.kind = rest.to_owned(),
                "UNIT" => row.unit = rest.to_owned(),
                other => panic!("{other}"),
            }
            continue;
        }
        let Some((series, labels)) = line.split_once('{') else { continue };
        let family = rows.iter_mut().filter(|(name, _)| series.starts_with(name.as_str()));
        let (_, row) = family.max_by_key(|(name, _)| name.len()).unwrap();
        let labels = labels.rsplit_once('}').unwrap().0;
        for (label, value) in labels.split(',').filter_map(|label| label.split_once('=')) {
            let value = value.trim_matches('"').to_owned();
            row.labels.entry(label.to_owned()).or_default().insert(value);
        }
    }
    let mut table = String::from("| name | type | labels | unit | meaning |\n|---|---|---|---|---|\n");
    for (name, row) in rows {
        let suffix = match row.kind.as_str() {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        let labels = row.labels.iter().filter(|(label, _)| *label != "le").map(|(label, values)| {
            if label == "version" {
                format!("`{label}`")
            } else {
                format!("`{label}`: {}", values.iter().map(String::as_str).collect::<Vec<_>>().join(", "))
            }
        });
        let labels = labels.collect::<Vec<_>>().join("; ");
        let dash = |text: String| if text.is_empty() { "–".to_owned() } else { text };
        let (labels, unit) = (dash(labels), dash(row.unit));
        writeln!(table, "| `{name}{suffix}` | {} | {labels} | {unit} | {} |", row.kind, row.help).unwrap();
    }
    table
}

#[test]
fn the_documented_metrics_are_the_metrics() {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/METRICS.md");
    let text = std::fs::read_to_string(&page).unwrap();
    let table = documented(&metrics().encode());
    // Found whole, line by line and between blank lines: nothing is missing and nothing is left over.
    assert!(text.contains(&format!("\n\n{table}\n")), "put this table into {}:\n\n{table}", page.display());
}
