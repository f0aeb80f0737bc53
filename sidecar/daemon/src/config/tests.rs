use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pillion_core::CacheMode;
use pillion_ssd::tier::Engine;

use super::*;

struct Case {
    folder: tempfile::TempDir,
    sources: Sources,
}

impl Case {
    fn new(toml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pillion.toml");
        fs::write(&file, toml).unwrap();
        Self { folder, sources: Sources { file: Some(file), ..Sources::default() } }
    }

    fn variable(mut self, name: &str, text: &str) -> Self {
        self.sources.variables.insert(name.to_owned(), text.to_owned());
        self
    }

    fn flag(mut self, key: &str, text: &str) -> Self {
        self.sources.flags.push((key.to_owned(), text.to_owned()));
        self
    }

    fn load(&self) -> Loaded {
        Config::load(&self.sources).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The error's text with the folder taken out.
    fn error(&self) -> String {
        let error = Config::load(&self.sources).expect_err("should be refused").to_string();
        error.replace(&format!("{}/", self.folder.path().display()), "")
    }
}

#[test]
fn defaults_are_those_of_the_architecture() {
    let config = Config::load(&Sources::default()).unwrap().config;
    assert_eq!(config, Config::default());
    assert_eq!(config.device, "auto");
    assert_eq!(config.host_pool, PoolSize::Percent(20));
    assert_eq!(config.lease(), Duration::from_secs(30));
    assert_eq!(config.heartbeat(), Duration::from_millis(250));
    assert_eq!(config.table_stamp(), Duration::from_millis(20));
    assert_eq!(config.grace(), Duration::from_secs(5));
    assert_eq!(config.drain(), Duration::from_secs(10));
    assert_eq!(config.idle_exit(), None);
    assert_eq!(config.http, HttpListen::On("127.0.0.1:9470".parse().unwrap()));
    assert_eq!((config.max_sessions, config.max_leases, config.copy_threads), (64, 4096, 2));
    assert_eq!(config.presence_slots, 1 << 18);
    assert_eq!((config.ssd.len(), config.ssd_limits(1 << 30).is_none()), (0, true));
    assert_eq!((config.ssd_cache_mode(), config.ssd_engine()), (CacheMode::WriteBack, Engine::Auto));
    assert_eq!((config.ssd_segment.0, config.ssd_wait_ms), (0, 200));
    assert_eq!(config.log_level, "info");
    assert_eq!((config.runtime_dir, config.state_dir, config.socket), (None, None, None));
}

#[test]
fn flag_beats_variable_beats_file_beats_default() {
    let case = Case::new("lease_seconds = 1\nheartbeat_ms = 100\ndrain_seconds = 7\n")
        .variable("PILLION_LEASE_SECONDS", "2")
        .variable("PILLION_HEARTBEAT_MS", "200")
        .flag("lease_seconds", "3");
    let loaded = case.load();
    let config = &loaded.config;
    assert_eq!((config.lease_seconds, config.heartbeat_ms, config.drain_seconds), (3, 200, 7));
    assert_eq!(config.grace_seconds, 5);
    assert_eq!(loaded.origins["lease_seconds"], Origin::Flag("--lease-seconds".to_owned()));
    assert_eq!(loaded.origins["heartbeat_ms"], Origin::Variable("PILLION_HEARTBEAT_MS".to_owned()));
    assert!(matches!(loaded.origins["drain_seconds"], Origin::File { line: 3, .. }));
    assert!(!loaded.origins.contains_key("grace_seconds"));
}

#[test]
fn the_named_file_beats_the_variable_beats_the_default_file() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, device: &str| {
        let path = folder.path().join(name);
        fs::write(&path, format!("device = \"{device}\"\n")).unwrap();
        path
    };
    let mut sources = Sources {
        file: Some(write("a", "by-flag")),
        variables: BTreeMap::from([(
            FILE_VARIABLE.to_owned(),
            write("b", "by-variable").display().to_string(),
        )]),
        default_file: Some(write("c", "by-default")),
        ..Sources::default()
    };
    assert_eq!(Config::load(&sources).unwrap().config.device, "by-flag");
    sources.file = None;
    assert_eq!(Config::load(&sources).unwrap().config.device, "by-variable");
    sources.variables.clear();
    assert_eq!(Config::load(&sources).unwrap().config.device, "by-default");
    sources.default_file = Some(folder.path().join("absent"));
    assert_eq!(Config::load(&sources).unwrap().config.device, "auto");
    sources.file = Some(folder.path().join("absent"));
    let error = Config::load(&sources).unwrap_err().to_string();
    assert!(error.contains("absent: expected a readable configuration file, came: No such file"), "{error}");
}

#[test]
fn an_error_says_key_origin_expectation_finding_and_cure() {
    assert_eq!(
        Case::new("\n\nlease_second = 3\n").error(),
        "lease_second (pillion.toml:3): expected a key that pillion has, came an unknown one: did you mean lease_seconds?"
    );
    assert_eq!(
        Case::new("redis = \"x\"").error(),
        "redis (pillion.toml:1): expected a key that pillion has, came an unknown one: remove it; `pillion config show` lists all keys"
    );
    assert_eq!(
        Case::new("device = \"cpu0\"\nlease_seconds = \"30s\"\n").error(),
        "lease_seconds (pillion.toml:2): expected a whole number from 1 to 3600 (s), came \"30s\": write for example lease_seconds = 30"
    );
    assert_eq!(
        Case::new("").variable("PILLION_HOST_POOL", "lots").error(),
        "host_pool (variable PILLION_HOST_POOL): expected a size from 1MiB, such as \"512MiB\", or a share from 1% to 90%, came \"lots\": write for example host_pool = \"512MiB\""
    );
    assert_eq!(
        Case::new("").flag("heartbeat_ms", "9").error(),
        "heartbeat_ms (flag --heartbeat-ms): expected a whole number from 10 to 10000 (ms), came 9: write for example heartbeat_ms = 250"
    );
    assert_eq!(
        Case::new("").flag("http", "0.0.0.0:9470").error(),
        "http (flag --http): expected a loopback address with a port, such as \"127.0.0.1:9470\", or \"off\", came \"0.0.0.0:9470\": metrics carry no password, so they stay on this host: use 127.0.0.1:9470, and a proxy to reach them from elsewhere"
    );
    let syntax = Case::new("device = \"cpu0\"\nlease_seconds = = 3\n").error();
    assert!(syntax.starts_with("pillion.toml:2: expected TOML, came something else ("), "{syntax}");
}

#[test]
fn everything_wrong_is_told_at_once() {
    let error = Case::new("leases = 1\ncopy_threads = 0\n")
        .variable("PILLION_LOG_LEVEL", "loud")
        .flag("device", "../etc")
        .error();
    assert_eq!(error.lines().count(), 4, "{error}");
}

#[test]
fn wrong_types_in_the_file_are_refused() {
    for line in [
        "device = 3",
        "device = \"\"",
        "device = \"..\"",
        "device = \"CPU\"",
        "device = \"a/b\"",
        "runtime_dir = \"relative\"",
        "host_pool = 0",
        "host_pool = \"1023KiB\"",
        "host_pool = true",
        "lease_seconds = 1.5",
        "lease_seconds = -1",
        "lease_seconds = 3601",
        "lease_seconds = 99999999999999999999",
        "presence_slots = 1000000",
        "presence_slots = 512",
        "http = 9470",
        "http = \"192.168.0.1:9470\"",
        "allow_uids = 1000",
        "allow_uids = [\"root\"]",
        "allow_uids = [-1]",
        "allow_uids = [4294967295]",
        "ssd = 3",
        "ssd = [\"relative=1GiB\"]",
        "ssd = [\"/a\"]",
        "ssd = [\"/a=\"]",
        "ssd = [\"/a=10%\"]",
        "ssd = [\"/a=191KiB\"]",
        "ssd = [\"/a=1GiB\", \"/a/=2GiB\"]",
        "ssd = { \"/a\" = \"1GiB\" }",
        "ssd_cache_mode = \"write-back\"",
        "ssd_engine = \"aio\"",
        "ssd_segment = \"63KiB\"",
        "ssd_segment = \"5GiB\"",
        "ssd_segment = 65537",
        "ssd_wait_ms = 0",
        "tenants = [1]",
        "[tenants]\nA = { uids = [] }",
        "[tenants]\na = 3",
        "[tenants]\na = { users = [] }",
        "[tenants]\na = { uids = [1], quota = 3 }",
        "log_level = 1979-05-27",
        "log_level = \"verbose\"",
    ] {
        let error = Case::new(line).error();
        assert!(error.contains("expected") && error.contains("pillion.toml:"), "{line}: {error}");
    }
}

#[test]
fn limits_just_pass() {
    let config =
        Case::new("host_pool = 1048576\npresence_slots = 1_024\nlease_seconds = 0xE10\ntable_stamp_ms = 50")
            .load()
            .config;
    assert_eq!(config.host_pool, PoolSize::Bytes(ByteSize(1 << 20)));
    assert_eq!((config.presence_slots, config.lease_seconds, config.table_stamp_ms), (1024, 3600, 50));
}

#[test]
fn lists_and_addresses_from_a_line() {
    let config = Case::new("")
        .variable("PILLION_ALLOW_UIDS", "1002, 1000,1000")
        .flag("http", "localhost:0")
        .load()
        .config;
    assert_eq!(config.allow_uids, [1000, 1002]);
    assert_eq!(config.http, HttpListen::On("127.0.0.1:0".parse().unwrap()));
    assert_eq!(Case::new("").flag("allow_uids", "").load().config.allow_uids, [] as [u32; 0]);
    assert_eq!(Case::new("").flag("http", "off").load().config.http, HttpListen::Off);
    assert!(Case::new("").flag("allow_uids", "1000,bob").error().contains("[1000, \"bob\"]"));
}

#[test]
fn ssd_directories_as_people_write_them() {
    let directory = |path: &str, bytes| SsdDirectory { path: path.into(), capacity: ByteSize(bytes) };
    let loaded = Case::new("ssd = [\"/a=b=100GiB\", \"/c/ = 192KiB\"]\nssd_segment = \"64KiB\"").load();
    assert_eq!(loaded.config.ssd, [directory("/a=b", 100 << 30), directory("/c", 192 << 10)]);
    assert_eq!(Case::new("ssd = \"/a=1GB\"").load().config.ssd, [directory("/a", 1_000_000_000)]);
    for text in ["/a=1MiB, /b=2MiB", "[\"/a=1MiB\", \"/b=2MiB\"]"] {
        let config = Case::new("").variable("PILLION_SSD", text).load().config;
        assert_eq!(config.ssd, [directory("/a", 1 << 20), directory("/b", 2 << 20)]);
    }
    assert!(Case::new("").flag("ssd", "").load().config.ssd.is_empty());
    assert_eq!(
        Case::new("").flag("ssd", "/a").error(),
        "ssd (flag --ssd): expected a list of directories, each as \"path=capacity\", such as [\"/var/lib/pillion/ssd=100GiB\"], came \"/a\": write for example ssd = [\"/var/lib/pillion/ssd=100GiB\"]"
    );
    let many = (0..17).map(|n| format!("/d{n}=1GiB")).collect::<Vec<_>>().join(",");
    assert!(Case::new("").flag("ssd", &many).error().contains("at most 16 directories"));
}

#[test]
fn tenants_only_stand_in_the_file() {
    let cure = "write for example tenants = { team-a = { uids = [1000] } } in the file";
    for case in [Case::new("").flag("tenants", "a"), Case::new("").variable("PILLION_TENANTS", "a=[1]")] {
        assert!(case.error().ends_with(cure), "{}", case.error());
    }
}

#[test]
fn variables_that_only_look_like_ours_do_not_stop_the_sidecar() {
    let loaded = Case::new("")
        .variable("PILLION_SERVICE_HOST", "10.0.0.1")
        .variable("PILLION_PORT_9470_TCP", "tcp://10.0.0.1:9470")
        .variable("PILLION_LEASE_SECOND", "3")
        .load();
    assert_eq!(
        loaded.warnings,
        ["variable PILLION_LEASE_SECOND is no key of pillion: did you mean PILLION_LEASE_SECONDS?"]
    );
}

fn tenants() -> Config {
    let toml = "allow_uids = [1000]\n[tenants]\nteam-a = { uids = [1001, 1002] }\nteam-b = [1002]\n";
    let mut config = Case::new(toml).load().config;
    config.own_uid = 500;
    config
}

#[test]
fn users_and_their_tenants() {
    let config = tenants();
    for uid in [0, 500, 1000, 1001, 1002] {
        assert_eq!(config.uid_allowed(uid), Ok(()), "{uid}");
    }
    assert_eq!(config.uid_allowed(1003), Err(Denied::Uid { uid: 1003 }));

    let allowed = |tenant: &str, uid| config.tenant_allowed(tenant, uid).is_ok();
    for (tenant, uids) in
        [("default", [0, 500, 1000]), ("team-a", [0, 500, 1001]), ("team-b", [0, 500, 1002])]
    {
        for uid in [0, 500, 1000, 1001, 1003] {
            assert_eq!(allowed(tenant, uid), uids.contains(&uid), "{tenant} {uid}");
        }
    }
    assert!(allowed("team-a", 1002));
}

#[test]
fn refusals_of_tenants_say_why() {
    let config = tenants();
    let name = |text: &str| text.parse::<TenantName>().unwrap();
    let denied = |tenant: &str, uid| config.tenant_allowed(tenant, uid).unwrap_err();
    assert_eq!(denied("team-a", 1000), Denied::NotAMember { tenant: name("team-a"), uid: 1000 });
    assert_eq!(denied("default", 1001), Denied::NotAMember { tenant: name("default"), uid: 1001 });
    assert_eq!(denied("team-c", 0), Denied::Unknown { tenant: name("team-c") });
    assert_eq!(denied("team-c", 1003), Denied::Uid { uid: 1003 }, "strangers learn no tenant names");
    assert_eq!(denied("team-a", 1003), Denied::Uid { uid: 1003 });
    assert!(matches!(denied("Team A", 0), Denied::Name(_)));
}

#[test]
fn a_configured_default_tenant_is_closed() {
    let config = Config {
        own_uid: 500,
        ..Case::new("allow_uids = [1000]\n[tenants]\ndefault = [1001]").load().config
    };
    assert!(config.tenant_allowed("default", 1001).is_ok());
    assert!(config.tenant_allowed("default", 1000).is_err());
}

#[test]
fn tenant_names_just_pass_and_just_fail() {
    for text in ["a", "a.b_c-9", &"x".repeat(64)] {
        assert!(text.parse::<TenantName>().is_ok(), "{text}");
    }
    for text in ["", "A", "a b", "ä", "a/b", &"x".repeat(65)] {
        assert!(text.parse::<TenantName>().is_err(), "{text}");
    }
}

#[test]
fn other_users_are_noticed() {
    let admits = |toml: &str| Config { own_uid: 500, ..Case::new(toml).load().config }.admits_other_users();
    assert!(!admits(""));
    assert!(!admits("allow_uids = [0, 500]"));
    assert!(admits("allow_uids = [501]"));
    assert!(admits("tenants = { a = [501] }"));
}

#[test]
fn what_show_prints_loads_back() {
    let toml = "host_pool = \"3GiB\"\nssd = [\"/s=1GiB\"]\nssd_segment = \"64MiB\"\nhttp = \"off\"\nruntime_dir = \"/x/\\\"y\"\n[tenants]\n\"a.b\" = { uids = [7] }\n";
    let loaded = Case::new(toml).flag("device", "cpu7").load();
    let shown = loaded.to_toml();
    assert!(shown.contains("device = \"cpu7\"  # flag --device\n"), "{shown}");
    assert!(shown.contains("pillion.toml:1\n"), "{shown}");
    assert!(shown.contains("lease_seconds = 30  # default\n"), "{shown}");
    assert_eq!(Case::new(&shown).load().config, loaded.config);
}

#[test]
fn keys_are_well_formed() {
    for key in KEYS {
        assert!(key.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{}", key.name);
        assert!(key.doc.ends_with('.') && !key.doc.contains('|'), "{}", key.name);
        assert_eq!(KEYS.iter().filter(|other| other.name == key.name).count(), 1, "{}", key.name);
        let example = Case::new(&format!("{} = {}", key.name, key.example));
        assert!(Config::load(&example.sources).is_ok(), "the example of {} is refused", key.name);
        let unit_in_name = [("_seconds", "s"), ("_ms", "ms")];
        for (suffix, unit) in unit_in_name {
            assert_eq!(key.name.ends_with(suffix), key.unit == unit, "{}", key.name);
        }
    }
}

fn repository_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn the_documented_table_is_the_table() {
    let page = repository_root().join("docs/CONFIGURATION.md");
    let text = fs::read_to_string(&page).unwrap();
    let table = super::docs::markdown_table();
    assert!(text.contains(&format!("\n\n{table}\n")), "put this table into {}:\n\n{table}", page.display());
}
