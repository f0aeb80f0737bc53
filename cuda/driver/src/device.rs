//! Devices and their primary contexts.

use std::{fmt, str::FromStr, sync::Arc};

use cudarc::driver::sys::{self, CUcontext, CUdevice_attribute, CUpointer_attribute};

use crate::{CudaError, error::cuda, init};

/// A device's UUID, as `nvidia-smi -L` prints it behind `GPU-`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&index) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Uuid {
    type Err = CudaError;

    fn from_str(text: &str) -> Result<Self, CudaError> {
        let unfit = || CudaError::Unfit(format!("expected a device UUID of 32 hex digits, came {text:?}"));
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
        if digits.len() != 32 || !digits.is_ascii() {
            return Err(unfit());
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| unfit())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| unfit())?;
        }
        Ok(Self(bytes))
    }
}

/// What the driver says of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// As CUDA numbers them in this process (`CUDA_VISIBLE_DEVICES`).
    pub ordinal: i32,
    /// E.g. "NVIDIA H200".
    pub name: String,
    /// Stable.
    pub uuid: Uuid,
    /// E.g. "0000:17:00.0".
    pub pci: String,
    /// Device memory.
    pub bytes: u64,
    /// The host's memory next to it, where the platform says.
    pub numa_node: Option<u32>,
    /// Whether it can use the host's own addresses of registered memory; it cannot on WSL 2.
    pub takes_host_pointers: bool,
}

impl Device {
    /// How sockets, locks and logs of its sidecar are named: `gpu-<uuid>`.
    pub fn label(&self) -> String {
        format!("gpu-{}", self.uuid)
    }

    fn at(ordinal: i32) -> Result<Self, CudaError> {
        let mut device = 0;
        // Pointers are to locals of the types that the driver writes; the buffers' lengths go with them.
        cuda!(cuDeviceGet(&raw mut device, ordinal))?;
        let mut name = [0; 256];
        cuda!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        cuda!(cuDeviceGetUuid_v2(&raw mut uuid, device))?;
        let mut pci = [0; 32];
        cuda!(cuDeviceGetPCIBusId(pci.as_mut_ptr(), pci.len() as i32, device))?;
        let mut bytes = 0;
        cuda!(cuDeviceTotalMem_v2(&raw mut bytes, device))?;
        let mut node = -1;
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID;
        // Drivers before 12.2 do not know the attribute: then sysfs may.
        let _ = cuda!(cuDeviceGetAttribute(&raw mut node, attribute, device));
        let pci = text(&pci);
        let numa_node = u32::try_from(node).ok().or_else(|| sysfs_node(&pci));
        let uuid = Uuid(uuid.bytes.map(|byte| byte as u8));
        let mut takes = 0;
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM;
        let _ = cuda!(cuDeviceGetAttribute(&raw mut takes, attribute, device));
        let (name, bytes, takes_host_pointers) = (text(&name), bytes as u64, takes == 1);
        Ok(Self { ordinal, name, uuid, pci, bytes, numa_node, takes_host_pointers })
    }
}

fn text(buffer: &[core::ffi::c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().map(|char| *char as u8).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn sysfs_node(pci: &str) -> Option<u32> {
    let path = format!("/sys/bus/pci/devices/{}/numa_node", pci.to_ascii_lowercase());
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The devices that this process may use, in CUDA's order.
///
/// # Errors
/// Where there is no driver, or it fails.
pub fn devices() -> Result<Vec<Device>, CudaError> {
    init()?;
    let mut count = 0;
    cuda!(cuDeviceGetCount(&raw mut count))?;
    (0..count).map(Device::at).collect()
}

/// The device that holds an address of device memory.
///
/// # Errors
/// Where it is no device memory of this process.
pub fn device_of(address: u64) -> Result<Device, CudaError> {
    init()?;
    let mut ordinal = 0i32;
    let attribute = CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    // The driver writes an int for this attribute.
    cuda!(cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, address))?;
    Device::at(ordinal)
}

/// A device's primary context, kept alive.
#[derive(Debug)]
pub struct Context {
    device: Device,
    context: CUcontext,
}

// SAFETY: a CUcontext may be made current on any thread, and by several at a time.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context. Takes up to a second, and device memory (400 to 550 MiB on an H100).
    ///
    /// # Errors
    /// What the driver says.
    pub fn retain(device: Device) -> Result<Arc<Self>, CudaError> {
        init()?;
        let mut context = std::ptr::null_mut();
        cuda!(cuDevicePrimaryCtxRetain(&raw mut context, device.ordinal))?;
        Ok(Arc::new(Self { device, context }))
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Makes it current on the calling thread.
    ///
    /// # Errors
    /// What the driver says.
    pub fn enter(&self) -> Result<(), CudaError> {
        // Retained above and released only on drop.
        cuda!(cuCtxSetCurrent(self.context))
    }

    /// Whether the calling thread has any current context.
    ///
    /// # Errors
    /// What the driver says.
    pub fn is_any_current() -> Result<bool, CudaError> {
        let mut context: CUcontext = std::ptr::null_mut();
        cuda!(cuCtxGetCurrent(&raw mut context))?;
        Ok(!context.is_null())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Nothing can be done where the driver refuses.
        let _ = cuda!(cuDevicePrimaryCtxRelease_v2(self.device.ordinal));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_written_as_nvidia_smi_does() {
        let uuid: Uuid = "1b4e28ba-2fa1-11d2-883f-b9a761bde3fb".parse().unwrap();
        assert_eq!(uuid.to_string(), "1b4e28ba-2fa1-11d2-883f-b9a761bde3fb");
        assert_eq!(uuid, "1B4E28BA2FA111D2883FB9A761BDE3FB".parse().unwrap());
        for wrong in ["", "1b4e28ba", "1b4e28ba-2fa1-11d2-883f-b9a761bde3fg", "é".repeat(16).as_str()] {
            assert!(wrong.parse::<Uuid>().is_err(), "{wrong}");
        }
    }
}
