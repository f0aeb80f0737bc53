//! A worker's registration, from its frame to a copier of its blocks.

use pillion_daemon::{
    driver::Mover,
    register::{Begun, Registered, register},
};
use pillion_layouts::{Worker, vllm::groups::Pages};
use pillion_protocol::{HEADER_BYTES, Message, frame::encode, wire};
use pillion_shm::{
    Access, Memfd, Seal,
    pidfd::{self, Peer},
};

use crate::{cursor::Cursor, layout};

/// Memory that is really made; larger layouts are presented with less than they say.
const MEMORY_BYTES_MAX: u64 = 1 << 20;

/// This process as the peer of a registration.
pub(crate) fn ourselves() -> Peer {
    let (left, _right) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    pidfd::peer(&left).expect("credentials")
}

/// The message that presents a worker, as the client makes it.
pub(crate) fn message_of(worker: &Worker, c: &mut Cursor<'_>) -> wire::Register {
    let groups = &worker.groups;
    let pages = || groups.iter().flat_map(|group| &group.pages);
    let wide = |of: fn(&Pages) -> u64| pages().map(of).collect::<Vec<_>>();
    let narrow = |of: fn(&Pages) -> u32| pages().map(of).collect::<Vec<_>>();
    let others = c.some(3, |c| [c.below(4) as u32, c.below(4) as u32, c.below(5) as u32]);
    let other =
        |index: usize| (!others.is_empty()).then(|| others.iter().map(|other| other[index]).collect());
    wire::Register {
        request: c.number(),
        layout: worker.order.clone(),
        num_blocks: worker.num_blocks,
        rank: worker.rank,
        world: worker.world,
        group_block_tokens: groups.iter().map(|group| group.block_tokens).collect(),
        group_fields: groups.iter().map(|_| 2).collect(),
        group_pages: groups.iter().map(|group| group.pages.len() as u32).collect(),
        keys: groups.iter().flat_map(|_| ["group".to_owned(), "shard".to_owned()]).collect(),
        values: (0..groups.len()).flat_map(|group| [group.to_string(), "1/1".to_owned()]).collect(),
        page_sizes: wide(|pages| pages.tensor.size),
        page_offsets: wide(|pages| pages.tensor.offset),
        page_layer_strides: wide(|pages| pages.tensor.layer_stride),
        page_block_strides: wide(|pages| pages.tensor.block_stride),
        page_layers: narrow(|pages| pages.tensor.layers.len() as u32),
        page_heads: narrow(|pages| pages.heads),
        page_states: narrow(|pages| pages.states),
        page_content_bytes: narrow(|pages| pages.content_bytes),
        page_bytes: wide(|pages| pages.page_bytes),
        page_kernel_blocks: narrow(|pages| pages.kernel_blocks),
        page_packings: pages().map(|pages| pages.packing.to_string()).collect(),
        layer_names: pages().flat_map(|pages| pages.tensor.layers.clone()).collect(),
        way: wire::Way::Memfd,
        memory_bytes: worker.memory_bytes,
        base: 0,
        canary_group: if c.rarely() { c.number32() } else { 0 },
        canary_seed: c.number(),
        canary_fresh: c.rarely(),
        canary_checked: !c.rarely(),
        device: None,
        handle: None,
        allocation_bytes: 0,
        allocation_offset: 0,
        events: None,
        other_groups: other(0),
        other_shards: other(1),
        other_counts: other(2),
        cache_mode: c.rarely().then(|| c.text(16)),
    }
}

/// Spoils columns: what was one column's length is another's.
fn spoil(c: &mut Cursor<'_>, message: &mut wire::Register) {
    for _ in 0..c.below(3) {
        match c.below(12) {
            0 => drop(message.page_sizes.pop()),
            1 => message.page_layers.push(c.number32()),
            2 => message.group_pages.push(c.number32()),
            3 => message.group_pages.iter_mut().for_each(|count| *count = c.number32()),
            4 => message.group_fields.iter_mut().for_each(|count| *count = c.number32()),
            5 => drop(message.keys.pop()),
            6 => message.values.push(c.text(8)),
            7 => message.page_layers.iter_mut().for_each(|count| *count = c.number32()),
            8 => message.layer_names.push(c.text(8)),
            9 => message.page_packings = message.page_packings.iter().map(|_| c.text(40)).collect(),
            10 => message.way = *c.pick(&[wire::Way::CudaIpc, wire::Way::CudaVmm, wire::Way::ProcessVm]),
            _ => message.group_block_tokens.push(c.number32()),
        }
    }
}

/// A memfd as a peer would pass it: sealed and of the right size, or not.
pub(crate) fn memory(c: &mut Cursor<'_>, bytes: u64) -> Option<Memfd> {
    let (odd, by) = (c.rarely(), c.number());
    let bytes = if odd { bytes.wrapping_add(by) } else { bytes };
    let memory = Memfd::create("fuzz", bytes.min(MEMORY_BYTES_MAX)).expect("memory");
    if !c.rarely() {
        memory.seal(Seal::Size).expect("seals");
    }
    (!c.rarely()).then_some(memory)
}

/// A registration is refused, or its copier moves each block without touching a byte that is not the block's, and reads
/// back what it wrote.
pub fn registration(data: &[u8]) {
    let mut c = Cursor::new(data, 2048);
    let worker = layout::worker(&mut c);
    if !layout::is_small(&worker) {
        return;
    }
    let mut message = message_of(&worker, &mut c);
    spoil(&mut c, &mut message);
    let bytes = encode(&Message::Register(message), 1);
    let Ok(Message::Register(message)) =
        Message::decode(pillion_protocol::Kind::Register, &bytes[HEADER_BYTES..])
    else {
        panic!("a registration that we encoded");
    };
    let memory = memory(&mut c, message.memory_bytes);
    let watched = memory
        .as_ref()
        .filter(|memory| memory.bytes() > 0)
        .map(|memory| memory.map(Access::ReadWrite).expect("a mapping of our own memory"));
    let fd = memory.as_ref().map(|memory| memory.fd().try_clone_to_owned().expect("a descriptor"));
    let Ok(begun) = register(&message, fd, ourselves(), None) else { return };
    let Begun::Host(registered) = begun else { panic!("there is no device") };
    let watched = watched.expect("memory of no bytes is refused");
    move_blocks(&registered, &message, &watched, &mut c);
}

fn bytes_of(map: &pillion_shm::Mapping) -> Vec<u8> {
    use std::sync::atomic::Ordering::Relaxed;
    map.words().iter().flat_map(|word| word.load(Relaxed).to_ne_bytes()).collect()
}

fn move_blocks(
    registered: &Registered,
    message: &wire::Register,
    watched: &pillion_shm::Mapping,
    c: &mut Cursor<'_>,
) {
    let Mover::Host(copier) = &registered.mover else { panic!("there is no device") };
    let registration = &registered.registration;
    let own = message.group_block_tokens.len();
    assert_eq!(registration.num_blocks, message.num_blocks);
    let last = registration.num_blocks - 1;
    for (index, group) in registration.groups.iter().enumerate() {
        let number = index as u16;
        assert_eq!(copier.record_bytes(number).ok(), Some(group.record_bytes));
        assert_eq!(group.load_only, index >= own);
        if group.record_bytes > 1 << 16 || watched.bytes() > 1 << 16 {
            continue;
        }
        let before = bytes_of(watched);
        let record = vec![c.byte(); group.record_bytes as usize];
        let sum = pillion_ssd::format::checksum(&record);
        copier.load(number, last, &record, sum).expect("a block of the engine");
        let after = bytes_of(watched);
        let changed = before.iter().zip(&after).filter(|(before, after)| before != after).count() as u64;
        assert!(changed <= group.record_bytes, "{changed} bytes changed");
        assert!(copier.load(number, last + 1, &record, sum).is_err(), "a block that there is not");
        let mut back = vec![0; record.len()];
        match copier.save(number, last, &mut back) {
            // Whole records of another size can be read back, too; it is the core that never asks for it.
            Ok(found) => assert!(found == sum && back == record),
            Err(_) => assert!(group.load_only),
        }
    }
    assert!(copier.record_bytes(registration.groups.len() as u16).is_err());
}
