//! Where the records are: a row for each, in its segment, and a table that finds the row of a key.
//!
//! A terabyte has half a million records: a row has 48 bytes, and the table 9 for each of its places.

use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use super::Location;
use crate::format::{RecordKey, SECTOR};

/// In a row's `bytes`, of which it takes 27 bits: the record was read since it was written.
const READ: u32 = 1 << 31;

#[derive(Debug, Clone, Copy)]
struct Row {
    key: RecordKey,
    sequence: u64,
    /// In sectors.
    position: u32,
    bytes: u32,
}

/// A row's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Of all directories' segments, in their order.
    segment: u32,
    row: u32,
}

pub(super) struct Index {
    /// All records ever placed in a segment in its life. One that the table does not lead to is dead.
    rows: Vec<Vec<Row>>,
    /// Where each directory's segments begin in `rows`.
    first: Vec<usize>,
    table: HashTable<Place>,
    /// Whoever chooses keys cannot choose that they collide.
    hasher: RandomState,
}

impl Index {
    /// Of directories with so many segments each.
    pub(super) fn new(segments: impl Iterator<Item = u32>) -> Self {
        let (mut first, mut total) = (Vec::new(), 0);
        for count in segments {
            first.push(total);
            total += count as usize;
        }
        let rows = (0..total).map(|_| Vec::new()).collect();
        Self { rows, first, table: HashTable::new(), hasher: RandomState::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(super) fn get(&self, key: &RecordKey) -> Option<Location> {
        self.find(key).map(|place| self.location(place))
    }

    pub(super) fn contains(&self, key: &RecordKey) -> bool {
        self.find(key).is_some()
    }

    /// Enters a record whose key is not there.
    pub(super) fn insert(&mut self, key: RecordKey, location: Location) {
        let segment = self.number(location.shelf.into(), location.slot);
        let Self { rows, table, hasher, .. } = self;
        let place = Place { segment: segment as u32, row: rows[segment].len() as u32 };
        let (position, bytes) = ((location.position / SECTOR as u64) as u32, location.bytes as u32);
        rows[segment].push(Row { key, sequence: location.sequence, position, bytes });
        let hash = |key: &RecordKey| hasher.hash_one(key);
        table.insert_unique(hash(&key), place, |it| hash(&row(rows, *it).key));
    }

    /// Its row stays until its segment's life ends.
    pub(super) fn remove(&mut self, key: &RecordKey) -> Option<Location> {
        let Self { rows, table, hasher, .. } = self;
        let found = table.find_entry(hasher.hash_one(key), |it| row(rows, *it).key == *key).ok()?;
        let (place, _) = found.remove();
        Some(self.location(place))
    }

    pub(super) fn mark_read(&mut self, key: &RecordKey) {
        if let Some(place) = self.find(key) {
            self.rows[place.segment as usize][place.row as usize].bytes |= READ;
        }
    }

    pub(super) fn was_read(&self, key: &RecordKey) -> bool {
        self.find(key).is_some_and(|place| row(&self.rows, place).bytes & READ != 0)
    }

    /// The records of a segment, in the order in which they came to it.
    pub(super) fn keys_in(&self, shelf: usize, slot: u32) -> impl Iterator<Item = RecordKey> + '_ {
        let segment = self.number(shelf, slot);
        let rows = self.rows.get(segment).map_or(&[][..], Vec::as_slice);
        let lives = move |(number, row): (usize, &Row)| {
            let place = Place { segment: segment as u32, row: number as u32 };
            (self.find(&row.key) == Some(place)).then_some(row.key)
        };
        rows.iter().enumerate().filter_map(lives)
    }

    /// So many more are to come, and no others.
    pub(super) fn reserve(&mut self, shelf: usize, slot: u32, more: usize) {
        let segment = self.number(shelf, slot);
        self.rows[segment].reserve_exact(more);
    }

    /// No more are to come.
    pub(super) fn shrink(&mut self, shelf: usize, slot: u32) {
        let segment = self.number(shelf, slot);
        self.rows[segment].shrink_to_fit();
    }

    /// Forgets the rows of a segment, all of them dead.
    pub(super) fn clear(&mut self, shelf: usize, slot: u32) {
        debug_assert!(self.keys_in(shelf, slot).next().is_none());
        let segment = self.number(shelf, slot);
        self.rows[segment] = Vec::new();
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (RecordKey, Location)> + '_ {
        self.table.iter().map(|place| (row(&self.rows, *place).key, self.location(*place)))
    }

    fn number(&self, shelf: usize, slot: u32) -> usize {
        self.first[shelf] + slot as usize
    }

    fn find(&self, key: &RecordKey) -> Option<Place> {
        self.table.find(self.hasher.hash_one(key), |it| row(&self.rows, *it).key == *key).copied()
    }

    fn location(&self, place: Place) -> Location {
        let segment = place.segment as usize;
        let shelf = self.first.partition_point(|first| *first <= segment) - 1;
        let row = row(&self.rows, place);
        Location {
            shelf: shelf as u16,
            slot: (segment - self.first[shelf]) as u32,
            position: u64::from(row.position) * SECTOR as u64,
            bytes: u64::from(row.bytes & !READ),
            sequence: row.sequence,
        }
    }
}

fn row(rows: &[Vec<Row>], place: Place) -> &Row {
    &rows[place.segment as usize][place.row as usize]
}
