//! Which device this sidecar serves, and what it does where there is no GPU.
//!
//! Neither the supervisor nor the commands load the CUDA driver: `pillion devices` does, in a process of its own
//! that ends at once. A driver that hangs or crashes takes only that process along.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use pillion_cuda::{Crew, Gpu, GpuParts, HostPool, PoolOptions, Watchdog, driver};
use serde::{Deserialize, Serialize};

use crate::{
    config::Config,
    machine,
    places::{Machine, Places},
};

/// The host's own device: engines that compute on the CPU.
pub const HOST: &str = "cpu0";
/// The first GPU, or else the host.
pub const AUTO: &str = "auto";
const GPU: &str = "gpu";
const GPU_UUID: &str = "gpu-";
/// Bytes that one registration of host memory has: some drivers refuse more than this at a time.
const PIN_PART: u64 = 64 << 30;
/// Helpers with checksums that a GPU's sidecar has unless more are asked for.
const HELPERS_MAX: usize = 8;
/// How long the driver may take to say what it sees. A cold driver without persistence takes seconds.
const LOOK_MAX: Duration = Duration::from_secs(30);

/// What the CUDA driver sees.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Devices {
    /// The CUDA version that the driver supports, such as 13000.
    pub driver: Option<i32>,
    /// In the driver's order.
    pub devices: Vec<Seen>,
    /// Why there is none.
    pub missing: Option<String>,
}

/// One GPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names say it; bytes are of device memory")]
pub struct Seen {
    pub device: String,
    pub ordinal: i32,
    pub name: String,
    pub pci: String,
    pub bytes: u64,
    pub numa_node: Option<u32>,
}

impl Devices {
    /// Asks the driver, in this process.
    pub fn look() -> Self {
        let seen = |device: driver::Device| Seen {
            device: device.label(),
            ordinal: device.ordinal,
            name: device.name,
            pci: device.pci,
            bytes: device.bytes,
            numa_node: device.numa_node,
        };
        let all = driver::driver_version().and_then(|version| Ok((version, driver::devices()?)));
        match all {
            Ok((version, devices)) => Self {
                driver: Some(version),
                missing: devices.is_empty().then(|| "the CUDA driver sees no device".to_owned()),
                devices: devices.into_iter().map(seen).collect(),
            },
            Err(error) => Self { missing: Some(error.to_string()), ..Self::default() },
        }
    }

    /// Asks the driver, in another process.
    fn look_elsewhere() -> Self {
        let failed = |text: String| Self { missing: Some(text), ..Self::default() };
        match ask_child() {
            Ok(text) => serde_json::from_slice(&text)
                .unwrap_or_else(|error| failed(format!("`pillion devices` said what is no report: {error}"))),
            Err(error) => failed(error.to_string()),
        }
    }

    /// For people.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn print(&self, out: &mut impl io::Write) -> io::Result<()> {
        if let Some(reason) = &self.missing {
            writeln!(out, "no GPU: {reason}")?;
        }
        for seen in &self.devices {
            let (mib, node) = (seen.bytes >> 20, seen.numa_node.map(|node| format!(", NUMA node {node}")));
            let Seen { device, ordinal, name, pci, .. } = seen;
            writeln!(out, "gpu{ordinal}  {device}  {name}, {mib} MiB, {pci}{}", node.unwrap_or_default())?;
        }
        Ok(())
    }
}

fn ask_child() -> Result<Vec<u8>> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["devices", "--json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start `pillion devices`")?;
    let begun = Instant::now();
    while child.try_wait()?.is_none() {
        if begun.elapsed() > LOOK_MAX {
            // It may hang in the driver: nobody waits for its end.
            let _ = child.kill();
            bail!("the CUDA driver did not answer within {} s", LOOK_MAX.as_secs());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(child.wait_with_output()?.stdout)
}

/// The device's own name for what a user wrote, and what to say about it.
///
/// # Errors
/// Where a GPU was named that is not there.
pub fn resolve(name: &str) -> Result<(String, Option<String>)> {
    // A whole name is taken as it is: a shim that starts its sidecar waits for us, and the driver may be slow while
    // engines start. The worker looks for the device.
    let whole = name.strip_prefix(GPU_UUID).is_some_and(|uuid| uuid.parse::<driver::Uuid>().is_ok());
    if whole || (!name.starts_with(GPU) && name != AUTO) {
        return Ok((name.to_owned(), None));
    }
    choose(name, &Devices::look_elsewhere())
}

fn choose(name: &str, seen: &Devices) -> Result<(String, Option<String>)> {
    let reason = seen.missing.clone().unwrap_or_default();
    if name == AUTO {
        return Ok(match seen.devices.first() {
            Some(first) => (
                first.device.clone(),
                Some(format!("serving {}, the first GPU ({})", first.device, first.name)),
            ),
            None => (
                HOST.to_owned(),
                Some(format!("no GPU ({reason}): serving {HOST} instead, engines that compute on the CPU")),
            ),
        });
    }
    let number = name.strip_prefix(GPU).and_then(|number| number.parse::<i32>().ok());
    let found = seen.devices.iter().find(|seen| seen.device == name || Some(seen.ordinal) == number);
    if let Some(found) = found {
        return Ok((found.device.clone(), Some(format!("serving {} ({})", found.device, found.name))));
    }
    ensure!(
        !seen.devices.is_empty(),
        "expected a GPU for device {name}, found none: {reason}; for engines that compute on the CPU use --device {HOST}"
    );
    let there: Vec<_> = seen.devices.iter().map(|seen| seen.device.as_str()).collect();
    bail!("expected device {name}, found only {}: see `pillion devices`", there.join(", "));
}

/// The same for commands that look for a running sidecar: `auto` is the one that runs.
///
/// # Errors
/// Where several run.
pub fn running(mut config: Config) -> Result<Config> {
    if config.device != AUTO || config.socket.is_some() {
        return Ok(config);
    }
    let found = sockets(&Places::choose(&config, &Machine)?.runtime_dir);
    config.device = match &found[..] {
        [] => HOST.to_owned(),
        [one] => one.clone(),
        several => bail!("expected --device, as several sidecars run here: {}", several.join(", ")),
    };
    Ok(config)
}

/// The devices that have a socket here.
pub fn sockets(runtime_dir: &Path) -> Vec<String> {
    let name = |entry: io::Result<std::fs::DirEntry>| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        Some(name.strip_suffix(".sock")?.to_owned())
    };
    let mut found: Vec<String> =
        std::fs::read_dir(runtime_dir).into_iter().flatten().filter_map(name).collect();
    found.sort();
    found
}

/// The memory that a worker serves from.
#[derive(Debug)]
pub struct Memory {
    /// Records lie here.
    pub pool: Arc<HostPool>,
    /// The device, where it is one.
    pub gpu: Option<Arc<Gpu>>,
}

/// Makes the pool, and for a GPU its context and the pool's pinning. Takes seconds for a large pool: runs on a
/// thread of its own.
///
/// # Errors
/// What the kernel or the driver says.
pub fn prepare(config: &Config, watchdog: &Watchdog) -> Result<Memory> {
    let available = machine::available_memory_bytes().context("cannot read the available memory")?;
    let Some(uuid) = config.device.strip_prefix(GPU_UUID) else {
        let pool_bytes = pool_bytes(config, available, 1)?;
        let pool = HostPool::create(pool_bytes).context("cannot make the host pool")?;
        return Ok(Memory { pool: Arc::new(pool), gpu: None });
    };
    let uuid: driver::Uuid = uuid.parse()?;
    let begun = Instant::now();
    let seen = driver::devices()?;
    let pool_bytes = pool_bytes(config, available, seen.len() as u64)?;
    let device = seen.into_iter().find(|seen| seen.uuid == uuid);
    let device = device.with_context(|| format!("the CUDA driver sees no device {}", config.device))?;
    let options = PoolOptions { bytes: pool_bytes, touch: true, numa_node: device.numa_node };
    let pool = Arc::new(HostPool::with(options).context("cannot make the host pool")?);
    let touched = begun.elapsed();
    let crew = Arc::new(Crew::start(helpers(config)).context("cannot start the copy threads")?);
    let parts = GpuParts {
        device,
        pool: Arc::clone(&pool),
        crew,
        watchdog: watchdog.clone(),
        batch: config.cuda_batch_copy,
        patience: config.grace(),
        call_patience: Duration::from_secs(config.cuda_call_seconds),
        pin_part: PIN_PART,
    };
    let gpu = Gpu::start(parts).with_context(|| {
        format!("cannot pin a host pool of {} MiB for {}", pool_bytes >> 20, config.device)
    })?;
    tracing::info!(
        device = config.device,
        name = gpu.device().name,
        copies = gpu.batch().name(),
        huge_pages = pool.has_huge_pages(),
        touch_ms = touched.as_millis() as u64,
        pin_ms = (begun.elapsed() - touched).as_millis() as u64,
        "the pool is pinned"
    );
    Ok(Memory { pool, gpu: Some(Arc::new(gpu)) })
}

/// The pool's size. A share of the memory is divided by the sidecars that are to be expected on this machine: all
/// look at the same memory before any of them has taken its part.
fn pool_bytes(config: &Config, available: u64, devices: u64) -> Result<u64> {
    let available = available / config.sidecars.max(devices).max(1);
    let bytes = config.host_pool.resolve(available) / pillion_core::CHUNK_BYTES * pillion_core::CHUNK_BYTES;
    ensure!(
        bytes > 0,
        "expected a host pool of at least {} bytes, got {}: raise host_pool",
        pillion_core::CHUNK_BYTES,
        config.host_pool
    );
    Ok(bytes)
}

/// One core checksums a third of what a PCIe 5 link moves, and there are two directions.
fn helpers(config: &Config) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (config.copy_threads as usize).max((cores / 2).min(HELPERS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Devices {
        let seen = |ordinal: i32, device: &str| Seen {
            device: device.to_owned(),
            ordinal,
            name: "G".into(),
            ..Seen::default()
        };
        let devices = vec![seen(0, "gpu-aa"), seen(1, "gpu-bb")];
        Devices { driver: Some(13_000), devices, missing: None }
    }

    #[test]
    fn a_device_is_chosen_by_number_by_name_or_as_the_first() {
        for (written, chosen) in
            [("auto", "gpu-aa"), ("gpu0", "gpu-aa"), ("gpu1", "gpu-bb"), ("gpu-bb", "gpu-bb")]
        {
            let (name, said) = choose(written, &two()).unwrap();
            assert_eq!(name, chosen);
            assert!(said.unwrap().contains(chosen));
        }
        let error = choose("gpu2", &two()).unwrap_err().to_string();
        assert!(error.contains("expected device gpu2, found only gpu-aa, gpu-bb"), "{error}");
        assert_eq!(resolve("cpu3").unwrap(), ("cpu3".to_owned(), None));
    }

    #[test]
    fn without_a_gpu_the_host_is_served_unless_a_gpu_was_asked_for() {
        let none = Devices { missing: Some("no libcuda".into()), ..Devices::default() };
        let (name, said) = choose("auto", &none).unwrap();
        assert_eq!(name, HOST);
        assert_eq!(
            said.unwrap(),
            "no GPU (no libcuda): serving cpu0 instead, engines that compute on the CPU"
        );
        let error = choose("gpu0", &none).unwrap_err().to_string();
        assert!(error.contains("found none: no libcuda") && error.contains("--device cpu0"), "{error}");
    }

    #[test]
    fn a_command_without_a_device_finds_the_one_sidecar() {
        let place = tempfile::tempdir().unwrap();
        let config =
            || Config { runtime_dir: Some(place.path().into()), device: AUTO.into(), ..Config::default() };
        assert_eq!(running(config()).unwrap().device, HOST);
        std::fs::write(place.path().join("gpu-aa.sock"), "").unwrap();
        std::fs::write(place.path().join("gpu-aa.lock"), "").unwrap();
        assert_eq!(running(config()).unwrap().device, "gpu-aa");
        std::fs::write(place.path().join("cpu0.sock"), "").unwrap();
        let error = running(config()).unwrap_err().to_string();
        assert!(error.contains("cpu0, gpu-aa"), "{error}");
        assert_eq!(running(Config { device: "cpu7".into(), ..config() }).unwrap().device, "cpu7");
    }
}
