//! Identity: tenants, namespaces and block keys (I9).
//!
//! A [`BlockKey`] can only be formed with a [`TenantKey`], and a tenant key never
//! leaves the sidecar: shims send the engine's block hashes, and what they become
//! here depends on the tenant that the attachment was granted.

use std::{borrow::Borrow, fmt, sync::Arc};

use crate::ids::NamespaceId;

/// The version of everything below; a change makes all older records unreachable.
const FORMAT: &[u8] = b"pillion key v1";

/// A tenant's secret, derived from the cluster secret.
#[derive(Clone, PartialEq, Eq)]
pub struct TenantKey([u8; 32]);

impl TenantKey {
    /// Wraps derived key material.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The seed of the presence tables' index keys, the same in all sidecars of this cluster secret, so that one
    /// key finds a block in any of their tables. It says nothing about the key.
    pub fn index_seed(&self) -> u64 {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"index seed");
        u64::from_le_bytes(first(hasher.finalize().as_bytes()))
    }
}

impl fmt::Debug for TenantKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantKey(…)")
    }
}

/// A tenant as an attachment was granted it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its name in the configuration.
    pub name: Arc<str>,
    /// Its secret.
    pub key: TenantKey,
}

/// A namespace's readable form: what must agree, sorted by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Namespace {
    fields: Vec<(String, String)>,
}

impl Namespace {
    /// Sorts the fields; `None` if a name comes twice.
    pub fn new(mut fields: Vec<(String, String)>) -> Option<Self> {
        fields.sort();
        fields.windows(2).all(|pair| pair[0].0 != pair[1].0).then_some(Self { fields })
    }

    /// Its id for a tenant in one epoch. The epoch of a fresh engine is empty.
    pub fn id(&self, tenant: &Tenant, epoch: &[u8]) -> NamespaceId {
        let mut hasher = blake3::Hasher::new_keyed(&tenant.key.0);
        hasher.update(FORMAT);
        part(&mut hasher, b"namespace");
        for (name, value) in &self.fields {
            part(&mut hasher, name.as_bytes());
            part(&mut hasher, value.as_bytes());
        }
        part(&mut hasher, epoch);
        NamespaceId(first(hasher.finalize().as_bytes()))
    }

    /// A field's value.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The same of another shard of its blocks: of the one with this index, of so many. `None` where the namespace
    /// does not name a shard.
    pub fn of_shard(&self, index: u32, shards: u32) -> Option<Self> {
        let mut fields = self.fields.clone();
        let shard = fields.iter_mut().find(|(name, _)| name == "shard")?;
        shard.1 = format!("{}/{shards}", u64::from(index) + 1);
        Some(Self { fields })
    }

    /// Whether only the shard differs.
    pub fn is_shard_of(&self, other: &Self) -> bool {
        let rest = |space: &Self| {
            space.fields.iter().filter(|(name, _)| name != "shard").cloned().collect::<Vec<_>>()
        };
        rest(self) == rest(other)
    }

    /// For people: `name=value` lines.
    pub fn text(&self) -> String {
        self.fields.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
    }
}

/// The identity of one stored block: 32 bytes, keyed by its tenant.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey([u8; 32]);

impl BlockKey {
    /// The only way to a key, but for those below. `hash` is the engine's hash of the whole prefix up to the block's end.
    pub fn new(tenant: &TenantKey, space: NamespaceId, group: u32, hash: &[u8; 32]) -> Self {
        // One BLAKE3 block: 64 bytes.
        let mut input = [0u8; 52];
        input[..16].copy_from_slice(&space.0);
        input[16..20].copy_from_slice(&group.to_le_bytes());
        input[20..].copy_from_slice(hash);
        Self(*blake3::keyed_hash(&tenant.0, &input).as_bytes())
    }

    /// For the SSD, where a record keeps its key.
    pub(crate) fn bytes(&self) -> [u8; 32] {
        self.0
    }

    /// The parent of a record that was found on the SSD and whose own key was proved. Nothing is looked up by it: it
    /// only says what is evicted after what.
    pub(crate) fn parent_of_proved(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl Borrow<[u8; 32]> for BlockKey {
    /// Hash and order are those of the bytes.
    fn borrow(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "BlockKey({a:02x}{b:02x}{c:02x}{d:02x}…)")
    }
}

fn part(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
}

fn first<const N: usize>(bytes: &[u8; 32]) -> [u8; N] {
    *bytes.first_chunk().expect("N is at most 32")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(n: u8) -> Tenant {
        Tenant { name: "t".into(), key: TenantKey::new([n; 32]) }
    }

    fn namespace(fields: &[(&str, &str)]) -> Namespace {
        Namespace::new(fields.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect()).unwrap()
    }

    #[test]
    fn ids_depend_on_every_field_tenant_and_epoch() {
        let base = namespace(&[("model", "a"), ("dtype", "f32")]);
        let id = base.id(&tenant(1), b"");
        assert_eq!(
            id,
            namespace(&[("dtype", "f32"), ("model", "a")]).id(&tenant(1), b""),
            "order is no matter"
        );
        let others = [
            namespace(&[("model", "b"), ("dtype", "f32")]).id(&tenant(1), b""),
            namespace(&[("model", "a"), ("dtype", "f16")]).id(&tenant(1), b""),
            // Length prefixes: moving a byte over a border is another namespace.
            namespace(&[("modela", ""), ("dtype", "f32")]).id(&tenant(1), b""),
            base.id(&tenant(2), b""),
            base.id(&tenant(1), &[7; 16]),
        ];
        assert!(others.iter().all(|other| *other != id));
    }

    #[test]
    fn a_field_that_comes_twice_is_refused() {
        assert_eq!(Namespace::new(vec![("a".into(), "1".into()), ("a".into(), "2".into())]), None);
    }

    #[test]
    fn another_shard_is_another_namespace() {
        let base = namespace(&[("model", "a"), ("shard", "1/2")]);
        assert_eq!(base.of_shard(0, 2), Some(base.clone()));
        assert_eq!(base.of_shard(3, 4), Some(namespace(&[("model", "a"), ("shard", "4/4")])));
        assert_eq!(namespace(&[("model", "a")]).of_shard(0, 2), None);
    }

    #[test]
    fn keys_differ_by_tenant_namespace_group_and_hash() {
        let key = |t: u8, s: u8, g, h: u8| {
            BlockKey::new(&TenantKey::new([t; 32]), NamespaceId([s; 16]), g, &[h; 32])
        };
        let base = key(1, 1, 0, 1);
        assert!(
            [key(2, 1, 0, 1), key(1, 2, 0, 1), key(1, 1, 1, 1), key(1, 1, 0, 2)].iter().all(|k| *k != base)
        );
    }

    #[test]
    fn key_material_is_not_printed() {
        assert_eq!(format!("{:?}", TenantKey::new([7; 32])), "TenantKey(…)");
        assert!(format!("{:?}", BlockKey([7; 32])).len() < 24);
    }
}
