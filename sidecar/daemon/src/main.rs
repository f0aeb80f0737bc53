//! The `pillion` command.

use std::{path::Path, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Parser;
use pillion_daemon::{
    cli::{Cli, Command, ConfigCommand},
    config::{Config, Loaded, Sources},
    device::{self, Devices},
    doctor,
    logging::{self, Format},
    places::{Machine, Places},
    serve,
    status::{self, StatusReport},
    worker,
};

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pillion: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(sources: &Sources) -> Result<Loaded> {
    let loaded = Config::load(sources)?;
    logging::init(&loaded.config.log_level, Format::of_stderr());
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    Ok(loaded)
}

/// How long a living sidecar may take to say how it is.
const STATUS_MAX: Duration = Duration::from_secs(2);

fn ask(socket: &Path) -> Result<StatusReport, String> {
    let text = pillion_client::fetch_status(socket, STATUS_MAX)?;
    StatusReport::from_json(text.as_bytes())
        .map_err(|error| format!("expected a status report, came {error}"))
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Serve(args) => {
            let mut config = load(&args.config.sources())?.config;
            let (device, said) = device::resolve(&config.device)?;
            if let Some(text) = said {
                tracing::info!("{text}");
            }
            // Its children serve the very device that was chosen here.
            let arguments = args.config.with("device", &device).to_args();
            config.device = device;
            serve::serve(&config, arguments, args.detach, args.detached)?;
        }
        Command::Worker(args) => worker::run(load(&args.config.sources())?.config, args.restarts)?,
        Command::Status(args) => {
            let config = device::running(Config::load(&args.config.sources())?.config)?;
            let places = Places::choose(&config, &Machine)?;
            let report = ask(&places.socket).map_err(anyhow::Error::msg)?;
            let out = &mut std::io::stdout().lock();
            if args.json { report.write_json(out)? } else { status::print(&report, out)? }
        }
        Command::Config(ConfigCommand::Check { file }) => {
            let loaded = Config::load(&Sources::of_process(file, Vec::new()))?;
            loaded.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
            match loaded.file {
                Some(file) => println!("{}: ok", file.display()),
                None => println!("no file; environment: ok"),
            }
        }
        Command::Config(ConfigCommand::Show(args)) => {
            print!("{}", Config::load(&args.sources())?.to_toml());
        }
        Command::Devices(args) => {
            let devices = Devices::look();
            let out = &mut std::io::stdout().lock();
            if args.json {
                serde_json::to_writer(&mut *out, &devices)?;
            } else {
                devices.print(out)?;
            }
        }
        Command::Doctor(args) => {
            if let Some(directory) = args.ssd() {
                let report = doctor::ssd::examine(&directory);
                let out = &mut std::io::stdout().lock();
                if args.json {
                    report.write_json(out)?
                } else {
                    report.print(out)?
                }
                return Ok(ExitCode::from(report.exit_code()));
            }
            let report = doctor::examine(&Config::load(&args.config.sources()), &ask);
            let out = &mut std::io::stdout().lock();
            if args.json {
                report.write_json(out)?
            } else {
                report.print(out)?
            }
            return Ok(ExitCode::from(report.exit_code()));
        }
    }
    Ok(ExitCode::SUCCESS)
}
