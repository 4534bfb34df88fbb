//! The one place that encodes and decodes what burla's programs send each other.
//!
//! A frame is a version byte, the header in bincode 2, and the tail as it is.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

/// The version of the envelopes that this program writes, and the only one that it reads.
pub const VERSION: u8 = 1;

/// Why bytes could not be turned into a message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Written by a program of another version.
    #[error("message is of version {found}, this program reads version {VERSION}")]
    Version {
        /// The version that the message names.
        found: u8,
    },
    /// There is no version byte.
    #[error("message is empty")]
    Empty,
    /// The header does not decode.
    #[error("message is damaged: {0}")]
    Damaged(#[from] bincode::error::DecodeError),
}

/// One frame of `header` and the concatenated `tail`.
#[must_use]
pub fn encode<H: Serialize>(header: &H, tail: &[&[u8]]) -> Bytes {
    let tail_len: usize = tail.iter().map(|part| part.len()).sum();
    let mut frame = BytesMut::with_capacity(256 + tail_len).writer();
    frame.get_mut().put_u8(VERSION);
    bincode::serde::encode_into_std_write(header, &mut frame, bincode::config::standard())
        .expect("our own headers always encode: they hold no unsupported types");
    let mut frame = frame.into_inner();
    for part in tail {
        frame.put_slice(part);
    }
    frame.freeze()
}

/// The header and the tail of a frame. The tail shares the frame's memory.
pub fn decode<H: DeserializeOwned>(frame: &Bytes) -> Result<(H, Bytes), Error> {
    match frame.first() {
        None => return Err(Error::Empty),
        Some(&VERSION) => {}
        Some(&found) => return Err(Error::Version { found }),
    }
    let (header, read) = bincode::serde::decode_from_slice(&frame[1..], bincode::config::standard())?;
    Ok((header, frame.slice(1 + read..)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_and_its_tail_is_not_copied() {
        let frame = encode(&("header".to_string(), 7u64), &[b"ab", b"", b"c"]);
        let ((name, number), tail): ((String, u64), Bytes) = decode(&frame).unwrap();
        assert_eq!((name.as_str(), number, &tail[..]), ("header", 7, &b"abc"[..]));
        assert_eq!(tail.as_ptr(), frame[frame.len() - 3..].as_ptr());
    }

    #[test]
    fn another_version_and_damage_are_told_apart() {
        let mut frame = encode(&7u64, &[]).to_vec();
        frame[0] = 9;
        let error = decode::<u64>(&frame.into()).unwrap_err();
        assert_eq!(error.to_string(), "message is of version 9, this program reads version 1");
        assert!(matches!(decode::<u64>(&Bytes::new()), Err(Error::Empty)));
        assert!(matches!(decode::<String>(&Bytes::from_static(&[1, 5, b'x'])), Err(Error::Damaged(_))));
    }
}
