//! A plot of the first study, as an SVG.

use std::fmt::Write as _;

use crate::{
    report::{distinct, mean},
    study::{BASE, CHOSEN, Results},
};

/// Policies that are drawn, with their colours: more would hide each other.
const DRAWN: [(&str, &str); 6] = [
    ("ceiling (Belady)", "#888888"),
    ("LRU, first block first", "#e69f00"),
    ("S3-FIFO", "#56b4e9"),
    ("W-TinyLFU", "#cc79a7"),
    (BASE, "#d55e00"),
    (CHOSEN.0, "#0072b2"),
];

const PANEL: (f64, f64) = (250.0, 170.0);
const COLUMNS: usize = 3;

/// Hit rate against size of the pool, a panel for each workload.
pub fn host(results: &Results) -> String {
    let names: Vec<&str> = results.workloads.iter().map(|workload| &*workload.name).collect();
    let names: Vec<&str> = names.into_iter().filter(|name| !name.contains(", behind")).collect();
    let (width, height) = (PANEL.0 + 50.0, PANEL.1 + 60.0);
    let lines = names.len().div_ceil(COLUMNS);
    let (all_width, all_height) = (width * COLUMNS as f64 + 20.0, height * lines as f64 + 60.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {all_width} {all_height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (number, name) in names.iter().enumerate() {
        let (left, top) =
            (45.0 + width * (number % COLUMNS) as f64, 60.0 + height * (number / COLUMNS) as f64);
        panel(&mut out, results, name, left, top);
    }
    for (number, (policy, colour)) in DRAWN.iter().enumerate() {
        let x = 45.0 + 145.0 * number as f64;
        let _ = writeln!(
            out,
            "<path d=\"M{x} 20h18\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"{}\" y=\"24\">{policy}</text>",
            x + 22.0
        );
    }
    out.push_str("</svg>\n");
    out
}

fn panel(out: &mut String, results: &Results, name: &str, left: f64, top: f64) {
    let (width, height) = PANEL;
    let cells: Vec<_> = results.host.iter().filter(|cell| cell.trace == name).collect();
    let pools = distinct(cells.iter().map(|cell| cell.pool));
    let rate = |pool: usize, policy: &str| {
        let cell = cells.iter().find(|cell| cell.pool == pool && cell.policy == policy);
        cell.map_or(0.0, |cell| 100.0 * mean(&cell.runs, |run| run.hit_rate()))
    };
    let most = cells.iter().map(|cell| 100.0 * mean(&cell.runs, |run| run.hit_rate())).fold(1.0, f64::max);
    // The next ten, but not far above.
    let top_rate = (most / 10.0).ceil() * 10.0;
    let x = |index: usize| left + width * index as f64 / (pools.len().max(2) - 1) as f64;
    let y = |rate: f64| top + height * (1.0 - rate / top_rate);
    let _ = writeln!(
        out,
        "<text x=\"{left}\" y=\"{}\" font-weight=\"bold\">{name}</text>\
         <rect x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{height}\" fill=\"none\" stroke=\"#ccc\"/>",
        top - 6.0
    );
    for step in 0..=2 {
        let rate = top_rate * f64::from(step) / 2.0;
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{rate} %</text>",
            left - 4.0,
            y(rate) + 4.0
        );
    }
    for (index, pool) in pools.iter().enumerate() {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x(index),
            top + height + 14.0,
            *pool as f64 / 10.0
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">pool, % of distinct blocks</text>",
        left + width / 2.0,
        top + height + 28.0
    );
    for (policy, colour) in DRAWN {
        let points: Vec<String> = pools
            .iter()
            .enumerate()
            .map(|(index, pool)| format!("{:.1},{:.1}", x(index), y(rate(*pool, policy))))
            .collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"/>",
            points.join(" ")
        );
    }
}
