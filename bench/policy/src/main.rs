//! The command behind `scripts/bench policy`.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use pillion_policy::{
    plot, report,
    study::{self, Size},
    trace::Trace,
};

const USAGE: &str =
    "usage: pillion-policy [--trace FILE] [--json FILE | --results DIR] [--plot DIR] [--quick]";

/// What Mooncake's conversation trace is called in results; the file itself may be called anything.
const TRACE_NAME: &str = "mooncake-conversation";

#[derive(Debug, Default)]
struct Options {
    trace: Option<PathBuf>,
    json: Option<PathBuf>,
    /// Where the JSON goes otherwise.
    results: Option<PathBuf>,
    plot: Option<PathBuf>,
    quick: bool,
}

fn options(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options::default();
    while let Some(argument) = arguments.next() {
        let mut value =
            || arguments.next().map(PathBuf::from).ok_or(format!("expected a path after {argument}"));
        match argument.as_str() {
            "--trace" => options.trace = Some(value()?),
            "--json" => options.json = Some(value()?),
            "--results" => options.results = Some(value()?),
            "--plot" => options.plot = Some(value()?),
            "--quick" => options.quick = true,
            _ => return Err(format!("expected an option, got {argument}\n{USAGE}")),
        }
    }
    Ok(options)
}

/// What went wrong, and the exit code that says so.
struct Failure(String, u8);

impl Failure {
    fn at(path: &Path, error: impl std::fmt::Display) -> Self {
        Self(format!("{}: {error}", path.display()), 2)
    }
}

fn run() -> Result<(), Failure> {
    let options = options(std::env::args().skip(1)).map_err(|error| Failure(error, 2))?;
    let size = if options.quick { Size::QUICK } else { Size::FULL };
    let mut workloads = study::made_up(size);
    if let Some(path) = &options.trace {
        // As of every benchmark: 3 says that what is to be measured is not there.
        let text = fs::read_to_string(path).map_err(|error| Failure(Failure::at(path, error).0, 3))?;
        let trace = Trace::mooncake(TRACE_NAME, &text).map_err(|error| Failure::at(path, error))?;
        workloads.insert(0, vec![trace]);
    }
    let results = study::study(&workloads, size);
    // Whoever reads only the beginning of it may close the pipe.
    let _ = io::stdout().write_all(report::tables(&results).as_bytes());
    // A part does not replace the whole.
    let whole = options.trace.is_some() && !options.quick;
    let name = if whole { "policy.json" } else { "policy-part.json" };
    if let Some(path) = options.json.or_else(|| options.results.map(|folder| folder.join(name))) {
        let commit = std::env::var("PILLION_BENCH_COMMIT").unwrap_or_default();
        let json = report::json(&results, &report::machine(), &commit);
        write(&path, &json)?;
    }
    if let Some(folder) = &options.plot {
        write(&folder.join("policy-host.svg"), &plot::host(&results))?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let folder = path.parent().map_or(Ok(()), fs::create_dir_all);
    folder.and_then(|()| fs::write(path, text)).map_err(|error| Failure::at(path, error))
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(error, code)) => {
            eprintln!("error: {error}");
            ExitCode::from(code)
        }
    }
}
