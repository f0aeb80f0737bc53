//! Devices: what they are called and what they can do.

use std::{
    ffi::{c_char, c_int, c_uint},
    sync::OnceLock,
};

use cudarc::driver::sys::{CUdevice, CUdevice_attribute, CUresult, CUuuid};

use crate::{
    call::{always, initialized, put, put_text},
    errors::Outcome,
    faults,
};

/// Bytes of a device. Memory is only taken from the host where it is touched.
pub(crate) const MEMORY_BYTES: usize = 16 << 30;

/// What `CUDA_VISIBLE_DEVICES` makes of `count` devices.
fn visible() -> Vec<usize> {
    static WANTED: OnceLock<Option<String>> = OnceLock::new();
    let count = faults::rules().devices;
    match WANTED.get_or_init(|| std::env::var("CUDA_VISIBLE_DEVICES").ok()) {
        None => (0..count).collect(),
        Some(wanted) => chosen(wanted, count),
    }
}

fn chosen(wanted: &str, count: usize) -> Vec<usize> {
    let index = |word: &str| match word.trim().strip_prefix("GPU-") {
        Some(prefix) => (0..count).find(|device| text(uuid(*device)).starts_with(prefix)),
        None => word.trim().parse().ok().filter(|device| *device < count),
    };
    // As the driver does: the first entry that names nothing ends the list.
    wanted.split(',').map_while(index).collect()
}

/// The device that the caller's ordinal means.
pub(crate) fn physical(device: CUdevice) -> Outcome<usize> {
    let visible = visible();
    usize::try_from(device)
        .ok()
        .and_then(|ordinal| visible.get(ordinal).copied())
        .ok_or(CUresult::CUDA_ERROR_INVALID_DEVICE)
}

/// The ordinal under which this process knows a device.
pub(crate) fn ordinal(physical: usize) -> CUdevice {
    // Devices that the faults took away meanwhile keep a number of their own.
    visible().iter().position(|device| *device == physical).unwrap_or(physical) as CUdevice
}

/// Devices that this process sees.
pub(crate) fn count() -> usize {
    visible().len()
}

fn uuid(physical: usize) -> [u8; 16] {
    let mut bytes = *b"\xfa\xce\xc0\xda\0\0\x40\0\x80\0\0\0\0\0\0\0";
    bytes[15] = physical as u8;
    bytes
}

fn text(uuid: [u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    [&uuid[..4], &uuid[4..6], &uuid[6..8], &uuid[8..10], &uuid[10..]].map(hex).join("-")
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> CUresult {
    always("cuDriverGetVersion", || put(version, faults::rules().driver))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGetCount(to: *mut c_int) -> CUresult {
    initialized("cuDeviceGetCount", || put(to, count() as c_int))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int) -> CUresult {
    initialized("cuDeviceGet", || {
        physical(ordinal)?;
        put(device, ordinal)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGetName(
    name: *mut c_char,
    length: c_int,
    device: CUdevice,
) -> CUresult {
    initialized("cuDeviceGetName", || {
        let text = format!("Pillion fake device {}", physical(device)?);
        put_text(name, usize::try_from(length).unwrap_or(0), &text)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGetUuid(to: *mut CUuuid, device: CUdevice) -> CUresult {
    initialized("cuDeviceGetUuid", || put_uuid(to, device))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGetUuid_v2(to: *mut CUuuid, device: CUdevice) -> CUresult {
    initialized("cuDeviceGetUuid_v2", || put_uuid(to, device))
}

fn put_uuid(to: *mut CUuuid, device: CUdevice) -> Outcome {
    put(to, CUuuid { bytes: uuid(physical(device)?).map(|byte| byte as c_char) })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGetAttribute(
    to: *mut c_int,
    attribute: c_uint,
    device: CUdevice,
) -> CUresult {
    // The attribute comes as a number: a caller may know more of them than the enum.
    const MULTIPROCESSORS: c_uint = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as c_uint;
    const ENGINES: c_uint = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT as c_uint;
    const MAJOR: c_uint = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as c_uint;
    const MINOR: c_uint = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as c_uint;
    const NUMA: c_uint = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID as c_uint;
    const BUS: c_uint = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID as c_uint;
    const SLOT: c_uint = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID as c_uint;
    const ABILITIES: [CUdevice_attribute; 10] = [
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_GPU_OVERLAP,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED,
    ];
    initialized("cuDeviceGetAttribute", || {
        let physical = physical(device)?;
        let value = match attribute {
            MULTIPROCESSORS => 132,
            ENGINES => 3,
            MAJOR => 9,
            MINOR => 0,
            NUMA => -1,
            BUS => pci(physical).0,
            SLOT => pci(physical).1,
            other => c_int::from(ABILITIES.iter().any(|ability| *ability as c_uint == other)),
        };
        put(to, value)
    })
}

/// Bus and slot: a place where no real machine is likely to have anything.
fn pci(physical: usize) -> (c_int, c_int) {
    (0xe0 + physical as c_int, 0x1e)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGetPCIBusId(
    to: *mut c_char,
    length: c_int,
    device: CUdevice,
) -> CUresult {
    initialized("cuDeviceGetPCIBusId", || {
        let (bus, slot) = pci(physical(device)?);
        put_text(to, usize::try_from(length).unwrap_or(0), &format!("0000:{bus:02X}:{slot:02X}.0"))
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: CUdevice) -> CUresult {
    initialized("cuDeviceTotalMem_v2", || {
        physical(device)?;
        put(bytes, MEMORY_BYTES)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_devices() {
        assert_eq!(text(uuid(1)), "facec0da-0000-4000-8000-000000000001");
        assert_eq!(chosen("2,0", 3), [2, 0]);
        assert_eq!(chosen("1,7,0", 3), [1]);
        assert_eq!(chosen("", 3), [0_usize; 0]);
        assert_eq!(chosen("GPU-facec0da-0000-4000-8000-000000000001", 3), [1]);
    }
}
