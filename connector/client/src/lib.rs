#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod affinity;
mod events;
mod launch;
mod link;
mod outbox;
mod places;
mod registration;
mod scheduler;
mod status;
mod worker;

pub use link::Options;
pub use places::default_socket;
pub use registration::{DeviceMemory, Memory, Other, Registration, RegistrationError};
pub use scheduler::{Grant, SchedulerClient};
pub use status::fetch_status;
pub use worker::{JobEvent, LoadJob, LoadRun, SaveJob, SaveRun, WorkerClient};

pub use pillion_cuda_driver::{CudaError, ForeignStream, device_of, init as cuda_init};
pub use pillion_layouts::{Refusal, Worker, vllm};
pub use pillion_shm::ring::Outcome;
