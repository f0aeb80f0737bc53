//! `pillion doctor --ssd DIR`: reads a directory of the SSD tier, proves every record, changes nothing.

use std::{
    io,
    path::{Path, PathBuf},
};

use pillion_ssd::{
    OpenError,
    format::{Refused, VERSION},
    verify::{self, Verdict},
};
use serde::Serialize;

/// How it ended, as the exit code says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// 0: everything is as it was written.
    Fine,
    /// 1: something is not.
    Damaged,
    /// 2: it could not be looked at: in use, no permission.
    NotExamined,
    /// 3: no directory of ours, or of a version that this program does not read.
    NotOurs,
}

/// What the directory holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Contents {
    /// Its id, drawn when it was made.
    pub directory_id: String,
    /// Of the format.
    pub format_version: u32,
    /// Segment files.
    pub segments: Segments,
    /// Records that can be got: identity and bytes proved.
    pub records: u64,
    /// Bytes of their payloads.
    pub record_bytes: u64,
    /// Older copies of such records, whole as well.
    pub superseded_records: u64,
    /// Records that a crash cut off while they were written: never acknowledged, not damage.
    pub cut_off_records: u64,
    /// Namespaces, and records in each, older copies included.
    pub namespaces: Vec<Namespace>,
    /// Bytes of all segment files.
    pub file_bytes: u64,
    /// Bytes of them that no current record takes.
    pub unused_bytes: u64,
    /// Files in the directory that are not ours.
    pub other_files: Vec<String>,
}

/// Numbers of segment files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Segments {
    /// Length of each.
    pub bytes: u64,
    /// With their footer.
    pub sealed: u32,
    /// Open when their writer ended: the next start reads and seals them.
    pub unsealed: u32,
    /// Without records.
    pub free: u32,
    /// That cannot be read: the next start retires them.
    pub retired: u32,
}

/// One namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Namespace {
    /// Its id.
    pub id: String,
    /// Its records.
    pub records: u64,
}

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The segment file's name.
    pub file: String,
    /// The record's first byte in it; 0 is the segment itself.
    pub offset: u64,
    /// What.
    pub what: String,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SsdReport {
    /// Our version.
    pub version: &'static str,
    /// The directory, as it was named.
    pub path: PathBuf,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it was not examined.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What it holds, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contents: Option<Contents>,
    /// Of all problems the number.
    pub problem_count: u64,
    /// The first hundred of them.
    pub problems: Vec<Problem>,
}

/// Looks at a directory. It is locked meanwhile: no sidecar can start on it.
pub fn examine(path: &Path) -> SsdReport {
    let mut report = SsdReport {
        version: env!("CARGO_PKG_VERSION"),
        path: path.to_owned(),
        outcome: Outcome::Fine,
        error: None,
        contents: None,
        problem_count: 0,
        problems: Vec::new(),
    };
    match verify::inspect(path) {
        Ok(verdict) => report.tell(&verdict),
        Err(error) => (report.outcome, report.error) = refused(&error),
    }
    report
}

fn refused(error: &OpenError) -> (Outcome, Option<String>) {
    let absent =
        |source: &io::Error| matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    let (outcome, text) = match error {
        OpenError::NotOurs { path, found } => {
            let holds =
                if found == "nothing" { "it is empty".to_owned() } else { format!("it holds `{found}`") };
            let text = format!(
                "{}: not a directory of Pillion's SSD tier: {holds}, and there is no file `pillion-ssd`; left as it is",
                path.display()
            );
            (Outcome::NotOurs, text)
        }
        OpenError::Io { source, .. } if absent(source) => {
            (Outcome::NotOurs, format!("{error}: expected a directory of Pillion's SSD tier"))
        }
        OpenError::Refused { source: Refused::Magic(_) | Refused::Version(_), .. } => {
            (Outcome::NotOurs, error.to_string())
        }
        OpenError::Refused { .. } => (Outcome::Damaged, error.to_string()),
        OpenError::Busy { path } => {
            let text = "a sidecar uses it: stop that one, then ask again; nothing was read";
            (Outcome::NotExamined, format!("{}: {text}", path.display()))
        }
        _ => (Outcome::NotExamined, error.to_string()),
    };
    (outcome, Some(text))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl SsdReport {
    fn tell(&mut self, verdict: &Verdict) {
        if verdict.problem_count > 0 {
            self.outcome = Outcome::Damaged;
        }
        self.problem_count = verdict.problem_count;
        let problem = |one: &verify::Problem| Problem {
            file: format!("{:08}.segment", one.slot),
            offset: one.position,
            what: one.what.to_string(),
        };
        self.problems = verdict.problems.iter().map(problem).collect();
        let mut namespaces: Vec<Namespace> =
            verdict.spaces.iter().map(|(id, records)| Namespace { id: hex(id), records: *records }).collect();
        namespaces.sort_by(|a, b| (b.records, &a.id).cmp(&(a.records, &b.id)));
        self.contents = Some(Contents {
            directory_id: hex(&verdict.superblock.directory.0),
            format_version: VERSION,
            segments: Segments {
                bytes: verdict.superblock.segment_bytes,
                sealed: verdict.sealed,
                unsealed: verdict.unsealed,
                free: verdict.free,
                retired: verdict.unreadable,
            },
            records: verdict.proved - verdict.superseded,
            record_bytes: verdict.proved_bytes - verdict.superseded_bytes,
            superseded_records: verdict.superseded,
            cut_off_records: verdict.torn,
            namespaces,
            file_bytes: verdict.file_bytes(),
            unused_bytes: verdict.unused_bytes(),
            other_files: verdict.strangers.clone(),
        });
    }

    /// 0 fine, 1 damage, 2 not examined, 3 not ours.
    pub fn exit_code(&self) -> u8 {
        match self.outcome {
            Outcome::Fine => 0,
            Outcome::Damaged => 1,
            Outcome::NotExamined => 2,
            Outcome::NotOurs => 3,
        }
    }

    /// For people.
    pub fn print(&self, out: &mut impl io::Write) -> io::Result<()> {
        const NAMESPACES_MAX: usize = 20;
        if let Some(error) = &self.error {
            return writeln!(out, "{error}");
        }
        let Some(contents) = &self.contents else { return Ok(()) };
        let mib = |bytes: u64| match bytes as f64 / f64::from(1 << 20) {
            mib if mib < 1024.0 => format!("{mib:.1} MiB"),
            mib => format!("{:.1} GiB", mib / 1024.0),
        };
        let Segments { bytes, sealed, unsealed, free, retired } = contents.segments;
        writeln!(out, "{}", self.path.display())?;
        writeln!(out, "directory   {}, format version {}", contents.directory_id, contents.format_version)?;
        writeln!(
            out,
            "segments    {sealed} sealed, {unsealed} not sealed, {free} free, {retired} retired, of {} each",
            mib(bytes)
        )?;
        writeln!(out, "records     {}, {}, all proved", contents.records, mib(contents.record_bytes))?;
        writeln!(
            out,
            "            and {} older copies, {} cut off by a crash",
            contents.superseded_records, contents.cut_off_records
        )?;
        writeln!(out, "namespaces  {}", contents.namespaces.len())?;
        for namespace in contents.namespaces.iter().take(NAMESPACES_MAX) {
            writeln!(out, "            {}: {} records", namespace.id, namespace.records)?;
        }
        if let Some(more) = contents.namespaces.len().checked_sub(NAMESPACES_MAX).filter(|more| *more > 0) {
            writeln!(out, "            and {more} more")?;
        }
        writeln!(out, "space       {} of {} unused", mib(contents.unused_bytes), mib(contents.file_bytes))?;
        if !contents.other_files.is_empty() {
            writeln!(out, "not ours    {}", contents.other_files.join(", "))?;
        }
        for Problem { file, offset, what } in &self.problems {
            writeln!(out, "DAMAGED     {file} at {offset}: {what}")?;
        }
        let shown = self.problems.len() as u64;
        if self.problem_count > shown {
            writeln!(out, "            and {} more", self.problem_count - shown)?;
        }
        match self.problem_count {
            0 => writeln!(out, "no damage found"),
            count => writeln!(
                out,
                "damage in {count} places: a sidecar drops such records when they are asked for, and serves the rest"
            ),
        }
    }

    /// For `--json`.
    pub fn write_json(&self, out: &mut impl io::Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        out.write_all(b"\n")
    }
}
