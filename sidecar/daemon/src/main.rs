//! The `pillion` command.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use pillion_daemon::{
    cli::{Cli, Command, ConfigCommand},
    config::{Config, Loaded, Sources},
    logging::{self, Format},
    serve, worker,
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

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Serve(args) => {
            let loaded = load(&args.config.sources())?;
            serve::serve(&loaded.config, args.config.to_args(), args.detach, args.detached)?;
        }
        Command::Worker(args) => worker::run(load(&args.config.sources())?.config, args.restarts)?,
        Command::Status(args) => {
            let loaded = Config::load(&args.config.sources())?;
            let places = pillion_daemon::places::Places::choose(&loaded.config, &pillion_daemon::places::Machine)?;
            let text = pillion_client::fetch_status(&places.socket, std::time::Duration::from_secs(2));
            println!("{}", text.map_err(anyhow::Error::msg)?);
        }
        Command::Config(ConfigCommand::Check { file }) => {
            Config::load(&Sources::of_process(file, Vec::new()))?;
            println!("ok");
        }
        Command::Config(ConfigCommand::Show(args)) => {
            print!("{}", Config::load(&args.sources())?.to_toml());
        }
        Command::Doctor(_) => anyhow::bail!("doctor comes with its module"),
    }
    Ok(ExitCode::SUCCESS)
}
