//! Labels with fixed values, and metrics that hold one series per value.

use std::fmt::Debug;
use std::marker::PhantomData;

use prometheus_client::encoding::EncodeMetric;
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::registry::{Registry, Unit};

/// One series' labels.
pub(super) type Labels = Vec<(&'static str, &'static str)>;

/// A label whose values are known when the sidecar is built.
pub trait LabelValue: Copy + Debug + PartialEq + Send + Sync + 'static {
    /// The label.
    const LABEL: &'static str;
    /// All its values.
    const ALL: &'static [Self];
    /// The value as text.
    fn text(self) -> &'static str;
    /// Its position in [`Self::ALL`].
    fn index(self) -> usize;
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident, $label:literal: $($(#[$value_doc:meta])* $value:ident = $text:literal),+ $(,)?) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$value_doc])* $value),+ }

        impl LabelValue for $name {
            const LABEL: &'static str = $label;
            const ALL: &'static [Self] = &[$(Self::$value),+];
            fn text(self) -> &'static str { match self { $(Self::$value => $text),+ } }
            fn index(self) -> usize { self as usize }
        }
    };
}

label!(
    /// Which way a job moves bytes.
    Direction, "direction":
    /// Sidecar to engine.
    Load = "load",
    /// Engine to sidecar.
    Save = "save",
);
label!(
    /// How a job ended.
    Outcome, "outcome":
    /// All of it.
    Done = "done",
    /// Not all of it.
    Failed = "failed",
    /// Given up.
    Cancelled = "cancelled",
);
label!(
    /// The way to an engine's memory.
    Path, "path":
    /// A shared mapping.
    Memfd = "memfd",
    /// `process_vm_readv` and `process_vm_writev`.
    ProcessVm = "process_vm",
    /// Device memory by a legacy IPC handle.
    CudaIpc = "cuda_ipc",
    /// Device memory by a VMM handle.
    CudaVmm = "cuda_vmm",
);
label!(
    /// Where records lie.
    Tier, "tier":
    /// Host memory.
    Host = "host",
    /// Local disks.
    Ssd = "ssd",
);
label!(
    /// Which way a disk moves bytes.
    Access, "access":
    /// From the disk.
    Read = "read",
    /// To the disk.
    Write = "write",
);
label!(
    /// What does a disk's reads and writes.
    SsdEngine, "engine":
    /// One ring.
    IoUring = "io_uring",
    /// `preadv` and `pwritev`, where io_uring is refused.
    Threads = "threads",
);
label!(
    /// Which way blocks go between sidecars of a node.
    Lending, "way":
    /// From a neighbour's pool.
    Borrowed = "borrowed",
    /// From ours.
    Lent = "lent",
);
label!(
    /// What became of a lease request that waited for the SSD.
    Waited, "outcome":
    /// All came in time.
    Whole = "whole",
    /// Not all did.
    CutShort = "cut_short",
);
label!(
    /// Which half of an engine attached.
    Role, "role":
    /// Its scheduler.
    Scheduler = "scheduler",
    /// A worker.
    Worker = "worker",
    /// None: a command that asks for the status.
    Observer = "observer",
);
label!(
    /// What became of a block in a lease request.
    Lookup, "outcome":
    /// Leased.
    Hit = "hit",
    /// Not leased.
    Miss = "miss",
);
label!(
    /// What became of a lease request.
    LeaseOutcome, "outcome":
    /// Some blocks were leased.
    Granted = "granted",
    /// Nothing was stored.
    Empty = "empty",
    /// A limit was reached.
    Refused = "refused",
);
label!(
    /// Why a block of a save was not stored.
    Skip, "reason":
    /// Stored already.
    Duplicate = "duplicate",
    /// Everything else is leased.
    NoRoom = "no_room",
);
label!(
    /// Why an attachment or a registration was refused; the reasons of the protocol.
    Refusal, "reason":
    /// None of the others.
    Unknown = "unknown",
    /// A protocol version that is not served.
    Version = "version",
    /// A user or tenant without permission.
    Denied = "denied",
    /// A limit was reached.
    Busy = "busy",
    /// The sidecar is about to exit.
    Draining = "draining",
    /// A layout that is not covered (I10).
    Layout = "layout",
    /// Memory that could not be reached.
    Memory = "memory",
    /// The canary was not where the layout says.
    Canary = "canary",
    /// Bytes that are no message.
    Malformed = "malformed",
    /// A namespace that cannot be served.
    Namespace = "namespace",
);

pub(super) fn pair<L: LabelValue>(value: L) -> (&'static str, &'static str) {
    (L::LABEL, value.text())
}

/// What a series may be.
pub(super) trait Metric:
    EncodeMetric + TypedMetric + Clone + Default + Debug + Send + Sync + 'static
{
}
impl<M: EncodeMetric + TypedMetric + Clone + Default + Debug + Send + Sync + 'static> Metric for M {}

pub(super) fn register(
    registry: &mut Registry,
    name: &str,
    help: &str,
    unit: Option<Unit>,
    metric: impl EncodeMetric + Debug + Send + Sync + 'static,
) {
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, metric),
        None => registry.register(name, help, metric),
    }
}

/// One series per value of a label.
#[derive(Debug)]
pub(super) struct PerLabel<L, M> {
    series: Vec<M>,
    label: PhantomData<L>,
}

impl<L: LabelValue, M: EncodeMetric + TypedMetric + Clone + Debug + Send + Sync + 'static> PerLabel<L, M> {
    pub(super) fn register(
        registry: &mut Registry,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        make: fn() -> M,
    ) -> Self {
        let family = family(registry, name, help, unit, make);
        let series = L::ALL.iter().map(|value| family.get_or_create_owned(&vec![pair(*value)])).collect();
        Self { series, label: PhantomData }
    }

    pub(super) fn at(&self, value: L) -> &M {
        &self.series[value.index()]
    }
}

/// One series per pair of values of two labels.
#[derive(Debug)]
pub(super) struct PerTwo<A, B, M> {
    series: Vec<M>,
    labels: PhantomData<(A, B)>,
}

impl<A: LabelValue, B: LabelValue, M> PerTwo<A, B, M>
where
    M: EncodeMetric + TypedMetric + Clone + Debug + Send + Sync + 'static,
{
    pub(super) fn register(
        registry: &mut Registry,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        make: fn() -> M,
    ) -> Self {
        let family = family(registry, name, help, unit, make);
        let pairs = A::ALL.iter().flat_map(|a| B::ALL.iter().map(|b| vec![pair(*a), pair(*b)]));
        Self {
            series: pairs.map(|labels| family.get_or_create_owned(&labels)).collect(),
            labels: PhantomData,
        }
    }

    pub(super) fn at(&self, a: A, b: B) -> &M {
        &self.series[a.index() * B::ALL.len() + b.index()]
    }
}

fn family<M>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    unit: Option<Unit>,
    make: fn() -> M,
) -> Family<Labels, M, fn() -> M>
where
    M: EncodeMetric + TypedMetric + Clone + Debug + Send + Sync + 'static,
    fn() -> M: MetricConstructor<M>,
{
    let family = Family::new_with_constructor(make);
    register(registry, name, help, unit, family.clone());
    family
}
