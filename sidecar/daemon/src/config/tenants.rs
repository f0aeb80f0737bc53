//! Who may be which tenant (I9: tenants are walls).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The tenant of everyone who names none.
pub const DEFAULT_TENANT: &str = "default";

/// A tenant's name: 1 to 64 characters from `a-z`, `0-9`, `.`, `_` and `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantName(String);

/// A text that is no tenant name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected {}, came {came:?}: rename the tenant in the engine's kv_connector_extra_config",
    TenantName::EXPECTED
)]
pub struct BadTenantName {
    /// The first characters of the text.
    pub came: String,
}

impl TenantName {
    /// The rule in words.
    pub const EXPECTED: &str = "a tenant name of 1 to 64 characters from a-z, 0-9, '.', '_' and '-'";

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TenantName {
    type Err = BadTenantName;

    fn from_str(text: &str) -> Result<Self, BadTenantName> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
        if (1..=64).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadTenantName { came: text.chars().take(64).collect() })
        }
    }
}

impl fmt::Display for TenantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the configuration says of one tenant.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tenant {
    /// Users that may attach as this tenant, beside the sidecar's own and root.
    pub uids: Vec<u32>,
}

/// The configured tenants.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tenants(BTreeMap<TenantName, Tenant>);

/// Why an attachment is refused. The text goes to the engine's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The user may not attach at all.
    #[error(
        "expected a user that may attach, came uid {uid}: add it to allow_uids or to a tenant of the sidecar's configuration"
    )]
    Uid {
        /// The peer's user.
        uid: u32,
    },
    /// The user may attach, but not as this tenant.
    #[error(
        "expected a user of tenant {tenant}, came uid {uid}: add it to the uids of that tenant in the sidecar's configuration, or use another tenant"
    )]
    NotAMember {
        /// The tenant that was asked for.
        tenant: TenantName,
        /// The peer's user.
        uid: u32,
    },
    /// No such tenant.
    #[error(
        "expected a configured tenant, came {tenant}: add `{tenant} = {{ uids = […] }}` under [tenants] of the sidecar's configuration, or leave the tenant out"
    )]
    Unknown {
        /// The tenant that was asked for.
        tenant: TenantName,
    },
    /// Not a name at all.
    #[error(transparent)]
    Name(#[from] BadTenantName),
}

impl Tenants {
    pub(super) fn new(tenants: BTreeMap<TenantName, Tenant>) -> Self {
        Self(tenants)
    }

    /// All tenants by name.
    pub fn iter(&self) -> impl Iterator<Item = (&TenantName, &Tenant)> {
        self.0.iter()
    }

    pub(super) fn has_member(&self, uid: u32) -> bool {
        self.0.values().any(|tenant| tenant.uids.contains(&uid))
    }

    /// Whether `uid` may be `tenant`. `trusted`: root or the sidecar's own user,
    /// who can read the sidecar's memory anyway. `listed`: in `allow_uids`.
    pub(super) fn check(
        &self,
        tenant: &str,
        uid: u32,
        trusted: bool,
        listed: bool,
    ) -> Result<TenantName, Denied> {
        let name: TenantName = tenant.parse()?;
        match self.0.get(&name) {
            Some(entry) if trusted || entry.uids.contains(&uid) => Ok(name),
            Some(_) if listed || self.has_member(uid) => Err(Denied::NotAMember { tenant: name, uid }),
            Some(_) => Err(Denied::Uid { uid }),
            None if name.as_str() == DEFAULT_TENANT && (trusted || listed) => Ok(name),
            None if name.as_str() == DEFAULT_TENANT && self.has_member(uid) => {
                Err(Denied::NotAMember { tenant: name, uid })
            }
            None if trusted || listed || self.has_member(uid) => Err(Denied::Unknown { tenant: name }),
            // Whoever may not attach learns nothing about which tenants exist.
            None => Err(Denied::Uid { uid }),
        }
    }
}
