//! Result records, as the runtime child writes them and the caller reads them.
//!
//! A record is `len: u32`, `seconds: f32`, `status: u8`, all little-endian, then `len` bytes:
//!
//! | status | bytes |
//! |---|---|
//! | 0 | the result |
//! | 1 | `error_len: u32`, the error as JSON ([`Failure`]), then what a failed command printed |
//! | 2 | as 0, but NaN or infinities in it were replaced by null |
//!
//! Records of consecutive inputs stand one after another; their index is their position.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

/// Bytes before a record's payload.
pub const HEADER: usize = 9;

const OK: u8 = 0;
const FAILED: u8 = 1;
const OK_NULLED: u8 = 2;

/// One call's end.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// How long the call took.
    pub seconds: f32,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It returned.
    Ok {
        /// The result, in the job's codec.
        result: Bytes,
        /// Whether NaN or infinities in it were replaced by null.
        nulled: bool,
    },
    /// It did not.
    Failed {
        /// Why.
        failure: Box<Failure>,
        /// What a failed command had printed to its stdout.
        output: Bytes,
    },
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What sort of failure it is.
    pub kind: FailureKind,
    /// The exception's type, for instance `ValueError`; else the kind's name.
    #[serde(rename = "type")]
    pub type_name: String,
    /// What happened, in a sentence.
    pub message: String,
    /// The traceback, with the user's own frames only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceback: Option<String>,
    /// Equal for failures of the same type in the same lines of code, whatever their messages.
    #[serde(default)]
    pub fingerprint: String,
    /// What to do about it, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Sorts of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureKind {
    /// The function raised.
    Exception,
    /// The function returned something that can't be sent.
    Result,
    /// The command ended with a status other than 0, or by a signal, or could not be started.
    Exit,
    /// The process that ran the call died, more often than is repeated.
    Crashed,
    /// The call used more memory than it may.
    Memory,
    /// The call took longer than it may.
    Timeout,
}

/// The records could not be read.
#[derive(Debug, thiserror::Error)]
#[error("result records are damaged: {0}")]
pub struct Damaged(pub &'static str);

impl Record {
    /// Appends the record to `to`.
    pub fn write(&self, to: &mut BytesMut) {
        let (status, parts): (u8, [&[u8]; 3]) = match &self.outcome {
            Outcome::Ok { result, nulled } => (if *nulled { OK_NULLED } else { OK }, [result, b"", b""]),
            Outcome::Failed { failure, output } => {
                let json = serde_json::to_vec(failure).expect("a failure holds only text");
                let len = u32::try_from(json.len()).expect("an error is shorter than 4 GiB").to_le_bytes();
                return put(to, self.seconds, FAILED, &[&len, &json, output]);
            }
        };
        put(to, self.seconds, status, &parts);
    }
}

fn put(to: &mut BytesMut, seconds: f32, status: u8, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    to.reserve(HEADER + len);
    to.put_u32_le(u32::try_from(len).expect("a result is shorter than 4 GiB"));
    to.put_f32_le(seconds);
    to.put_u8(status);
    for part in parts {
        to.put_slice(part);
    }
}

/// Bytes of the first record in `bytes`, header included; none if it is not whole.
#[must_use]
pub fn first_len(bytes: &[u8]) -> Option<usize> {
    let len = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?) as usize + HEADER;
    (bytes.len() >= len).then_some(len)
}

/// Whether the first record in `bytes` is of a call that failed.
#[must_use]
pub fn first_failed(bytes: &[u8]) -> bool {
    bytes.get(HEADER - 1) == Some(&FAILED)
}

/// How long the call of the first record in `bytes` took, in seconds.
#[must_use]
pub fn first_seconds(bytes: &[u8]) -> f32 {
    bytes.get(4..8).and_then(|seconds| seconds.try_into().ok()).map_or(0.0, f32::from_le_bytes)
}

/// Takes the first record off `bytes`, sharing its memory.
pub fn take(bytes: &mut Bytes) -> Result<Record, Damaged> {
    let len = first_len(bytes).ok_or(Damaged("a record is cut short"))?;
    let mut record = bytes.split_to(len);
    let seconds = f32::from_le_bytes([record[4], record[5], record[6], record[7]]);
    let status = record[8];
    let payload = record.split_off(HEADER);
    let outcome = match status {
        OK | OK_NULLED => Outcome::Ok { result: payload, nulled: status == OK_NULLED },
        FAILED => failed(payload)?,
        _ => return Err(Damaged("a record has an unknown status")),
    };
    Ok(Record { seconds, outcome })
}

fn failed(payload: Bytes) -> Result<Outcome, Damaged> {
    let len: [u8; 4] = payload.get(..4).and_then(|b| b.try_into().ok()).ok_or(Damaged("no error length"))?;
    let end = 4 + u32::from_le_bytes(len) as usize;
    let json = payload.get(4..end).ok_or(Damaged("an error is cut short"))?;
    let failure = serde_json::from_slice(json).map_err(|_| Damaged("an error does not parse"))?;
    Ok(Outcome::Failed { failure, output: payload.slice(end..) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_in_order_and_damage_is_noticed() {
        let failure = Failure {
            kind: FailureKind::Exit,
            type_name: "exit".into(),
            message: "exit status 3".into(),
            traceback: None,
            fingerprint: "x".into(),
            hint: None,
        };
        let records = [
            Record {
                seconds: 0.5,
                outcome: Outcome::Ok { result: Bytes::from_static(b"42"), nulled: false },
            },
            Record {
                seconds: 1.5,
                outcome: Outcome::Failed { failure: Box::new(failure), output: Bytes::from_static(b"out\n") },
            },
            Record { seconds: 0.0, outcome: Outcome::Ok { result: Bytes::new(), nulled: true } },
        ];
        let mut bytes = BytesMut::new();
        records.iter().for_each(|record| record.write(&mut bytes));
        let mut bytes = bytes.freeze();
        assert!(take(&mut bytes.slice(..bytes.len() - 20)).is_ok());
        for expected in records {
            assert_eq!(first_failed(&bytes), matches!(expected.outcome, Outcome::Failed { .. }));
            assert_eq!(take(&mut bytes).unwrap(), expected);
        }
        assert!(bytes.is_empty());
        assert!(take(&mut Bytes::from_static(b"\x09\0\0\0abcd")).is_err());
    }
}
