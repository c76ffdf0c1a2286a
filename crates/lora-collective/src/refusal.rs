//! The reasons for which a rank refuses a connection.

use std::fmt;

/// The reason why a connection was refused. The number is the byte of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum HandshakeRefusal {
    /// The caller uses another version of the protocol.
    Version = 1,
    /// The token differs.
    Token = 2,
    /// The job differs.
    Job = 3,
    /// The caller's generation is older.
    Generation = 4,
    /// The world size, the caller's rank or the called rank does not fit this group.
    Member = 5,
    /// The caller's rank is connected already.
    Duplicate = 6,
}

impl HandshakeRefusal {
    const ALL: [Self; 6] =
        [Self::Version, Self::Token, Self::Job, Self::Generation, Self::Member, Self::Duplicate];

    /// Returns the refusal with this byte.
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|refusal| *refusal as u8 == code)
    }

    /// Whether another call cannot succeed. [`Self::Token`] and [`Self::Job`] are not permanent,
    /// because the called process may still be forming another job's group.
    pub(crate) fn is_permanent(self) -> bool {
        !matches!(self, Self::Token | Self::Job)
    }
}

impl fmt::Display for HandshakeRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "another protocol version",
            Self::Token => "wrong token",
            Self::Job => "another job",
            Self::Generation => "an older generation",
            Self::Member => "another world size, or not the rank that was called",
            Self::Duplicate => "this rank is connected already",
        })
    }
}
