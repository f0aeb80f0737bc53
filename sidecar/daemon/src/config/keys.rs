//! The table of keys. Parsing, flags, `config show`, `config check` and
//! docs/CONFIGURATION.md all follow it; nothing else names a key.

use super::Config;
use super::ssd::{CACHE_MODES, ENGINES};
use super::value::{Kind, Value};

/// One key of the configuration.
pub struct Key {
    /// Its name in the file.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// Its default as it would stand in a variable; "" for "decided at start".
    pub default: &'static str,
    /// Unit of the number, or "".
    pub unit: &'static str,
    /// One sentence for users.
    pub doc: &'static str,
    /// A value to show in advice.
    pub(super) example: &'static str,
    pub(super) put: fn(&mut Config, Value),
    pub(super) get: fn(&Config) -> Value,
}

impl Key {
    /// The environment variable.
    pub fn variable(&self) -> String {
        format!("PILLION_{}", self.name.to_ascii_uppercase())
    }

    /// The flag, without dashes in front.
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// The key with that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        KEYS.iter().find(|key| key.name == name)
    }
}

macro_rules! key {
    ($field:ident: $variant:ident, $kind:expr, $default:literal, $unit:literal, $example:literal, $doc:literal) => {
        Key {
            name: stringify!($field),
            kind: $kind,
            default: $default,
            unit: $unit,
            doc: $doc,
            example: $example,
            put: |config, value| match value {
                Value::$variant(value) => config.$field = value,
                other => unreachable!("{} read as {other:?}", stringify!($field)),
            },
            get: |config| Value::$variant(config.$field.clone()),
        }
    };
}

/// Every key, in the order of the documentation.
pub static KEYS: &[Key] = &[
    key!(device: Text, Kind::Device, "auto", "", "\"gpu0\"",
        "The device that this sidecar serves; names its socket, lock and log: `cpu0`, `gpuN` or `gpu-<uuid>` (see `pillion devices`); `auto` is the first GPU, else `cpu0`."),
    key!(runtime_dir: Path, Kind::Path, "", "", "\"/run/pillion\"",
        "Folder of socket, lock and pid files, mode 0700. Default: `$XDG_RUNTIME_DIR/pillion`, else `/run/pillion`, else `/tmp/pillion-<uid>`."),
    key!(state_dir: Path, Kind::Path, "", "", "\"/var/lib/pillion\"",
        "Folder of the cluster secret and the log, mode 0700. Default: `$XDG_STATE_HOME/pillion`, else `/var/lib/pillion`, else `~/.local/state/pillion`."),
    key!(socket: Path, Kind::Path, "", "", "\"/run/pillion/cpu0.sock\"",
        "The socket that engines attach to. Default: `<runtime_dir>/<device>.sock`."),
    key!(host_pool: PoolSize, Kind::PoolSize, "20%", "", "\"512MiB\"",
        "Host memory for KV blocks: bytes, or a share of the memory available at start, divided by the sidecars that share it."),
    key!(sidecars: Whole, Kind::Whole(1, 1024), "1", "", "8",
        "Sidecars that share this machine's memory, for a `host_pool` that is a share; never less than the GPUs that the driver shows. A shim that starts several ranks' sets it."),
    key!(ssd: Ssd, Kind::Ssd, "", "", "[\"/var/lib/pillion/ssd=100GiB\"]",
        "Directories on local disks, each with the bytes that it may take; blocks go there, too, and are found again after a restart. Each serves one sidecar: `{device}` in a path stands for its device. In variable and flag: separated by commas."),
    key!(ssd_cache_mode: Text, Kind::Choice(CACHE_MODES), "write_back", "", "\"write_back\"",
        "`write_back`: written behind the save's acknowledgement; `write_through`: before it, durably; `write_around`: as `write_back`, and such blocks leave the host pool first; `read_only`: nothing is written."),
    key!(ssd_segment: Size, Kind::Segment, "0", "", "\"64MiB\"",
        "Length of the files in a new SSD directory, and the unit of its eviction; 0: a 32nd of the smallest capacity, between 16MiB and 256MiB. A block must fit into one, a directory must hold three."),
    key!(ssd_engine: Text, Kind::Choice(ENGINES), "auto", "", "\"auto\"",
        "How the disks are read and written: `uring`, `threads`, or `auto`: io_uring where the kernel lets us."),
    key!(ssd_wait_ms: Whole, Kind::Whole(1, 450), "200", "ms", "200",
        "How long a lookup waits for blocks to be read from the SSD before it is answered with those that are there; connectors give up after 500 ms."),
    key!(ssd_ahead_ms: Whole, Kind::Whole(0, 10_000), "1000", "ms", "1000",
        "A lookup is also answered with blocks that will have been read from the SSD within this time, as fast as that has been; their load copies them as they come, and fails if none comes for this long. 0: only with those that are there."),
    key!(lease_seconds: Whole, Kind::Whole(1, 3600), "30", "s", "30",
        "How long a lease keeps blocks in place; renewed while its job lives."),
    key!(heartbeat_ms: Whole, Kind::Whole(10, 10_000), "250", "ms", "250",
        "Interval of heartbeats between shim and sidecar."),
    key!(table_stamp_ms: Whole, Kind::Whole(1, 50), "20", "ms", "20",
        "How often the presence table is stamped; shims treat one that is older than 100 ms as empty."),
    key!(grace_seconds: Whole, Kind::Whole(1, 600), "5", "s", "5",
        "How long a mute worker may hold engine blocks before the supervisor kills it."),
    key!(drain_seconds: Whole, Kind::Whole(0, 600), "10", "s", "10",
        "How long SIGTERM waits for running jobs."),
    key!(idle_exit_seconds: Whole, Kind::Whole(0, 2_592_000), "0", "s", "1800",
        "Exit after this long without a session; 0: never. A shim that starts the sidecar sets 1800."),
    key!(http: Http, Kind::Http, "127.0.0.1:9470", "", "\"127.0.0.1:9470\"",
        "Address of `/metrics`, `/healthz` and `/readyz`, loopback only; the first free port from this one, at most 100 further; `off` for none."),
    key!(allow_uids: Uids, Kind::Uids, "", "", "[1000]",
        "Users whose engines may attach, beside the sidecar's own user and root. In variable and flag: separated by commas."),
    key!(tenants: Tenants, Kind::Tenants, "", "", "{ team-a = { uids = [1000] } }",
        "Tenants and the users that may be one. Tenant `default` needs no entry and is open to the users above. In the file only."),
    key!(max_sessions: Whole, Kind::Whole(1, 1024), "64", "sessions", "64",
        "Attachments at a time; an engine takes two (scheduler and worker)."),
    key!(max_leases: Whole, Kind::Whole(1, 65_536), "4096", "leases", "4096",
        "Leases at a time; beyond it a lookup is a miss."),
    key!(copy_threads: Whole, Kind::Whole(1, 64), "2", "threads", "2",
        "Threads that copy and checksum; with a GPU, whose copy engines copy, threads that help with checksums, at least half the cores up to 8."),
    key!(cuda_call_seconds: Whole, Kind::Whole(1, 3600), "60", "s", "60",
        "How long a call of the CUDA driver that waits for other processes (import, unmap) may take before the worker ends and starts anew; copies have `grace_seconds`."),
    key!(neighbours: Switch, Kind::Switch, "on", "", "\"off\"",
        "Whether this sidecar reads records out of the pools of this user's other sidecars in runtime_dir, and lets them read its own."),
    key!(cuda_batch_copy: Switch, Kind::Switch, "on", "", "\"off\"",
        "Whether `cuMemcpyBatchAsync` is used where the CUDA driver has it; `off`: one call per fragment."),
    key!(presence_slots: Whole, Kind::PowerOfTwo(1024, 16_777_216), "262144", "slots", "262144",
        "Slots of the presence table, one per stored block; more blocks than about three quarters of it are not found."),
    key!(log_level: Text, Kind::Level, "info", "", "\"info\"",
        "Least severe messages that are logged: error, warn, info, debug or trace."),
];
