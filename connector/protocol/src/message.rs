//! The closed set of messages, as owned values.

use crate::{FrameError, frame::MAX_PAYLOAD_BYTES, wire};

macro_rules! messages {
    ($($name:ident / $reader:ident = $kind:literal, $doc:literal;)*) => {
        /// What a frame holds, as its header says it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u16)]
        pub enum Kind { $(#[doc = $doc] $name = $kind,)* }

        impl TryFrom<u16> for Kind {
            type Error = ();
            fn try_from(kind: u16) -> Result<Self, ()> {
                match kind { $($kind => Ok(Self::$name),)* _ => Err(()) }
            }
        }

        /// A decoded message.
        #[derive(Debug, Clone, PartialEq)]
        #[expect(clippy::large_enum_variant, reason = "a registration is rare, and no message lives long")]
        pub enum Message { $(#[doc = $doc] $name(wire::$name),)* }

        impl Message {
            /// The kind that its frame carries.
            pub fn kind(&self) -> Kind {
                match self { $(Self::$name(_) => Kind::$name,)* }
            }

            pub(crate) fn write<'b>(&self, builder: &'b mut planus::Builder) -> &'b [u8] {
                match self { $(Self::$name(table) => builder.finish(table, None),)* }
            }

            /// Verifies and decodes a payload.
            ///
            /// # Errors
            /// [`FrameError::Malformed`] with what the verifier found.
            pub fn decode(kind: Kind, payload: &[u8]) -> Result<Self, FrameError> {
                let malformed = |text: planus::Error| FrameError::Malformed { kind, text: text.to_string() };
                Ok(match kind {
                    $(Kind::$name => {
                        let table = <wire::$reader as planus::ReadAsRoot>::read_as_root(payload)
                            .map_err(malformed)?;
                        let bytes = table.text_bytes().map_err(malformed)?;
                        if bytes > MAX_PAYLOAD_BYTES {
                            let text = format!(
                                "expected strings of at most {MAX_PAYLOAD_BYTES} bytes in all, got {bytes} that share them"
                            );
                            return Err(FrameError::Malformed { kind, text });
                        }
                        Self::$name(wire::$name::try_from(table).map_err(malformed)?)
                    })*
                })
            }
        }
    };
}

/// Bytes of all strings in vectors, as decoding would copy them. A vector's entries are offsets: without this
/// look a small frame whose strings are all one would decode to gigabytes. (Equal strings do share their bytes: builders
/// see to that.) Other fields can share bytes too, but
/// there are only so many of them.
trait Text {
    fn text_bytes(&self) -> planus::Result<usize>;
}

type Strings<'a> = planus::Vector<'a, planus::Result<&'a str>>;

fn sum(vectors: &[Strings<'_>]) -> planus::Result<usize> {
    let mut bytes = 0;
    for text in vectors.iter().flat_map(|vector| vector.iter()) {
        bytes += text?.len();
    }
    Ok(bytes)
}

macro_rules! text {
    ($($reader:ident: $($field:ident)*;)*) => {
        $(impl Text for wire::$reader<'_> {
            fn text_bytes(&self) -> planus::Result<usize> {
                sum(&[$(self.$field()?,)*])
            }
        })*
    };
}

text! {
    HelloRef:; WelcomeRef:; RefusedRef:; NamespaceOpenedRef:; RegisteredRef:; LeaseRef:; LeasedRef:; RenewRef:;
    ReleaseRef:; SaveRef:; LoadRef:; CancelRef:; PingRef:; PongRef:; ByeRef:; StatusQueryRef:; StatusRef:;
    UnregisterRef:; UnregisteredRef:; NeighbourTableRef:; NeighbourGoneRef:; BorrowRef:; DamagedRef:;
    TenantServedRef:;
    BorrowedRef: formats;
    OpenNamespaceRef: keys values;
    RegisterRef: keys values page_packings layer_names;
}

messages! {
    Hello / HelloRef = 1, "A client introduces itself.";
    Welcome / WelcomeRef = 2, "The sidecar accepts it.";
    Refused / RefusedRef = 3, "The sidecar says no, and why.";
    OpenNamespace / OpenNamespaceRef = 4, "A scheduler names its namespace.";
    NamespaceOpened / NamespaceOpenedRef = 5, "Its id.";
    Register / RegisterRef = 6, "A worker presents its KV memory.";
    Registered / RegisteredRef = 7, "It is usable.";
    Lease / LeaseRef = 8, "A scheduler asks for a lease.";
    Leased / LeasedRef = 9, "What was granted.";
    Renew / RenewRef = 10, "Keeps a lease alive.";
    Release / ReleaseRef = 11, "Ends a lease.";
    Save / SaveRef = 12, "A worker submits a save job.";
    Load / LoadRef = 13, "A worker submits a load job.";
    Cancel / CancelRef = 14, "A worker gives a job up.";
    Ping / PingRef = 15, "Heartbeat of the client.";
    Pong / PongRef = 16, "Its answer.";
    Bye / ByeRef = 17, "The sidecar ends a session in order.";
    StatusQuery / StatusQueryRef = 18, "An observer asks for the state.";
    Status / StatusRef = 19, "The state, as JSON.";
    Unregister / UnregisterRef = 20, "A worker's memory is about to go away.";
    Unregistered / UnregisteredRef = 21, "Nothing here reaches it any more.";
    NeighbourTable / NeighbourTableRef = 22, "A presence table of another sidecar.";
    NeighbourGone / NeighbourGoneRef = 23, "It counts no more.";
    Borrow / BorrowRef = 24, "A neighbour asks for records.";
    Borrowed / BorrowedRef = 25, "What it may read.";
    Damaged / DamagedRef = 26, "A neighbour found a record damaged.";
    TenantServed / TenantServedRef = 27, "A neighbour has engines of this tenant.";
}
