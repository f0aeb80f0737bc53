//! The command line. Flags of the configuration come from its table of keys.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Args, Command as ClapCommand, FromArgMatches, Parser, Subcommand};

use crate::config::{FILE_VARIABLE, KEYS, Key, Sources};

/// Pillion: a KV-cache sidecar for LLM inference engines.
#[derive(Debug, Parser)]
#[command(name = "pillion", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the sidecar of one device
    Serve(ServeArgs),
    /// Show what a running sidecar holds and does
    Status(StatusArgs),
    /// Show the GPUs that the CUDA driver sees, and the names of their sidecars
    Devices(DevicesArgs),
    /// Check what this machine, its folders and its sidecar are fit for, or a directory of the SSD tier
    Doctor(DoctorArgs),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// The process that serves engines; started by `serve`
    #[command(hide = true)]
    Worker(WorkerArgs),
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Go to the background once the sidecar is ready; the log goes to the state folder
    #[arg(long)]
    pub detach: bool,
    /// This is the process in the background.
    #[arg(long, hide = true)]
    pub detached: bool,
    /// The configuration's flags.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Which sidecar.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Arguments of `devices`.
#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Which sidecar. With `--ssd DIR` that directory is verified instead of the machine: all of it is read, nothing
    /// is written.
    #[command(flatten)]
    pub config: ConfigArgs,
}

impl DoctorArgs {
    /// The directory of the SSD tier that is to be verified: the flag's, without the capacity that it may have.
    pub fn ssd(&self) -> Option<PathBuf> {
        let (_, text) = self.config.flags.iter().find(|(key, _)| key == "ssd")?;
        Some(text.rsplit_once('=').map_or(text.as_str(), |(path, _)| path).into())
    }
}

/// Subcommands of `config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a configuration file together with the environment
    Check {
        /// The file; default: the one that `serve` would read
        file: Option<PathBuf>,
    },
    /// Print every value and where it came from
    Show(ConfigArgs),
}

/// Arguments of the hidden `worker`.
#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// How often the supervisor has restarted it
    #[arg(long, default_value_t = 0)]
    pub restarts: u64,
    /// The configuration's flags, as `serve` got them.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// `--config` and one flag per key that fits on a line.
#[derive(Debug, Clone, Default)]
pub struct ConfigArgs {
    /// The configuration file.
    pub file: Option<PathBuf>,
    /// Flags as (key, text).
    pub flags: Vec<(String, String)>,
}

impl ConfigArgs {
    /// With this process's environment.
    pub fn sources(&self) -> Sources {
        Sources::of_process(self.file.clone(), self.flags.clone())
    }

    /// With another value for one key.
    pub fn with(mut self, key: &str, text: &str) -> Self {
        self.flags.retain(|(there, _)| there != key);
        self.flags.push((key.to_owned(), text.to_owned()));
        self
    }

    /// The same arguments again, for a process that may start in another folder.
    pub fn to_args(&self) -> Vec<std::ffi::OsString> {
        let named = std::env::var_os(FILE_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        let mut args = Vec::new();
        if let Some(file) = self.file.clone().or(named) {
            args.push("--config".into());
            args.push(std::path::absolute(&file).unwrap_or(file).into());
        }
        for (key, text) in &self.flags {
            // With "=": a value may begin with a dash.
            args.push(format!("--{}={text}", key.replace('_', "-")).into());
        }
        args
    }
}

fn keys_on_a_line() -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(|key| key.kind.fits_on_a_line())
}

impl Args for ConfigArgs {
    fn augment_args(command: ClapCommand) -> ClapCommand {
        let file = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help(
                "Configuration file [default: $PILLION_CONFIG, else /etc/pillion/pillion.toml if it exists]",
            );
        let flags = keys_on_a_line().map(|key| {
            let default =
                if key.default.is_empty() { String::new() } else { format!(" [default: {}]", key.default) };
            Arg::new(key.name)
                .long(key.flag())
                .value_name(if key.unit.is_empty() { "VALUE".to_owned() } else { key.unit.to_uppercase() })
                .allow_negative_numbers(true)
                .help_heading("Configuration")
                .help(format!("{}{default}", key.doc.trim_end_matches('.')))
        });
        command.arg(file).args(flags)
    }

    fn augment_args_for_update(command: ClapCommand) -> ClapCommand {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ConfigArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.file = matches.get_one::<PathBuf>("config").cloned();
        let flag =
            |key: &'static Key| Some((key.name.to_owned(), matches.get_one::<String>(key.name)?.clone()));
        self.flags = keys_on_a_line().filter_map(flag).collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parsed(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.command)
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_key_that_fits_is_a_flag() {
        let Ok(Command::Serve(serve)) = parsed(
            "pillion serve --detach --config /c --device cpu3 --lease-seconds 7 --host-pool=20% --allow-uids 1,2",
        ) else {
            panic!("should parse");
        };
        assert!(serve.detach);
        assert_eq!(serve.config.file, Some("/c".into()));
        let pair = |key: &str, text: &str| (key.to_owned(), text.to_owned());
        let expected =
            [("device", "cpu3"), ("host_pool", "20%"), ("lease_seconds", "7"), ("allow_uids", "1,2")];
        assert_eq!(serve.config.flags, expected.map(|(key, text)| pair(key, text)));

        for key in keys_on_a_line() {
            let line = format!("pillion serve --{} x", key.flag());
            assert!(matches!(parsed(&line), Ok(Command::Serve(_))), "{line}");
        }
        assert!(parsed("pillion serve --tenants a").is_err());
    }

    #[test]
    fn a_worker_gets_what_serve_got() {
        let Ok(Command::Serve(serve)) = parsed("pillion serve --config /c --lease-seconds -7 --http off")
        else {
            panic!("should parse");
        };
        let mut line = vec!["pillion".into(), "worker".into(), "--restarts".into(), "3".into()];
        line.extend(serve.config.to_args());
        let Command::Worker(worker) = Cli::try_parse_from(line).unwrap().command else {
            panic!("should be a worker");
        };
        assert_eq!((worker.config.file, worker.config.flags), (serve.config.file, serve.config.flags));
        assert_eq!(worker.restarts, 3);
    }

    #[test]
    fn a_file_beside_us_is_found_from_elsewhere() {
        let args = ConfigArgs { file: Some("pillion.toml".into()), flags: Vec::new() }.to_args();
        assert_eq!(args[0], "--config");
        assert_eq!(PathBuf::from(&args[1]), std::env::current_dir().unwrap().join("pillion.toml"));
    }

    #[test]
    fn the_other_commands() {
        assert!(matches!(parsed("pillion status --json"), Ok(Command::Status(args)) if args.json));
        assert!(matches!(parsed("pillion doctor --device cpu1"), Ok(Command::Doctor(args)) if !args.json));
        assert!(matches!(
            parsed("pillion doctor --ssd /x --json"),
            Ok(Command::Doctor(args)) if args.ssd() == Some("/x".into())
        ));
        assert!(matches!(
            parsed("pillion config check"),
            Ok(Command::Config(ConfigCommand::Check { file: None }))
        ));
        assert!(matches!(
            parsed("pillion config check /x"),
            Ok(Command::Config(ConfigCommand::Check { file: Some(_) }))
        ));
        assert!(matches!(parsed("pillion config show"), Ok(Command::Config(ConfigCommand::Show(_)))));
        assert!(parsed("pillion").is_err());
        let help = Cli::command().render_help().to_string();
        assert!(!help.contains("worker"), "{help}");
    }
}
