//! Frames between a worker and its runtime child: a kind, a length, a payload.

use std::io::{self, Read, Write};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes before a payload.
const HEADER: usize = 9;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// To the child: the job, as JSON.
    Job = b'J',
    /// To the child: a view of a batch.
    Batch = b'B',
    /// To the child: the window may be written from its beginning again.
    Continue = b'C',
    /// From the child: it is up, or has loaded its function; JSON.
    Ready = b'R',
    /// From the child: it can't run this job; JSON.
    Unable = b'U',
    /// From the child: there are new records in the window.
    Written = b'W',
    /// From the child: the window is full.
    Full = b'F',
    /// From the child: a record that does not fit in the window.
    Big = b'G',
    /// From the child: the batch is done, up to a position.
    Done = b'D',
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::Job,
        Self::Batch,
        Self::Continue,
        Self::Ready,
        Self::Unable,
        Self::Written,
        Self::Full,
        Self::Big,
        Self::Done,
    ];

    fn parse(byte: u8) -> io::Result<Self> {
        let known = Self::ALL.into_iter().find(|kind| *kind as u8 == byte);
        known
            .ok_or_else(|| io::Error::other(format!("the runtime child sent a frame of unknown kind {byte}")))
    }
}

/// A frame's first bytes.
fn header(kind: Kind, len: usize) -> [u8; HEADER] {
    let mut bytes = [kind as u8; HEADER];
    bytes[1..].copy_from_slice(&(len as u64).to_le_bytes());
    bytes
}

fn parse_header(bytes: [u8; HEADER]) -> io::Result<(Kind, usize)> {
    let len: [u8; 8] = bytes[1..].try_into().expect("eight bytes");
    Ok((Kind::parse(bytes[0])?, usize::try_from(u64::from_le_bytes(len)).map_err(io::Error::other)?))
}

/// A frame whose payload is the concatenation of `parts`, in parts as well.
pub(crate) fn frame(kind: Kind, parts: &[Bytes]) -> Vec<Bytes> {
    let header = Bytes::copy_from_slice(&header(kind, parts.iter().map(Bytes::len).sum()));
    std::iter::once(header).chain(parts.iter().filter(|part| !part.is_empty()).cloned()).collect()
}

/// Reads frames; what was read of one stays here when the future is dropped.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    buffer: BytesMut,
    expected: Option<(Kind, usize)>,
}

impl Reader {
    /// The next frame; none at the end of the stream. Cancel-safe.
    pub(crate) async fn next(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
    ) -> io::Result<Option<(Kind, Bytes)>> {
        loop {
            if self.expected.is_none() && self.buffer.len() >= HEADER {
                let bytes = self.buffer.split_to(HEADER);
                let (kind, len) = parse_header(bytes[..].try_into().expect("as long as a header"))?;
                self.expected = Some((kind, len));
                self.buffer.reserve(len);
            }
            if let Some((kind, len)) = self.expected
                && self.buffer.len() >= len
            {
                self.expected = None;
                return Ok(Some((kind, self.buffer.split_to(len).freeze())));
            }
            self.buffer.reserve(4096);
            if from.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }
}

/// Writes a frame from a process without a runtime of its own.
pub(crate) fn send_blocking(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    to.write_all(&header(kind, payload.len()))?;
    to.write_all(payload)
}

/// Reads a frame in a process without a runtime of its own; none at the end of the stream.
pub(crate) fn receive_blocking(from: &mut impl Read) -> io::Result<Option<(Kind, Bytes)>> {
    let mut bytes = [0; HEADER];
    match from.read_exact(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let (kind, len) = parse_header(bytes)?;
    let mut payload = vec![0; len];
    from.read_exact(&mut payload)?;
    Ok(Some((kind, payload.into())))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn frames_survive_being_cut_anywhere_and_readers_being_dropped() {
        let (mut ours, mut theirs) = tokio::io::duplex(7);
        let writer = tokio::spawn(async move {
            let big = frame(Kind::Big, &[Bytes::from_static(b"one "), Bytes::from_static(b"two")]);
            for part in big.into_iter().chain(frame(Kind::Written, &[])) {
                theirs.write_all(&part).await.unwrap();
            }
        });
        let mut reader = Reader::default();
        let mut frames = Vec::new();
        loop {
            // Dropped over and over in the middle of a frame.
            match tokio::time::timeout(Duration::from_nanos(1), reader.next(&mut ours)).await {
                Err(_) => tokio::task::yield_now().await,
                Ok(frame) => match frame.unwrap() {
                    Some(frame) => frames.push(frame),
                    None => break,
                },
            }
        }
        writer.await.unwrap();
        assert_eq!(frames, [(Kind::Big, "one two".into()), (Kind::Written, Bytes::new())]);
    }

    #[test]
    fn both_kinds_of_reader_agree() {
        let mut bytes = Vec::new();
        send_blocking(&mut bytes, Kind::Done, &[1, 2, 3, 4]).unwrap();
        let mut from = &bytes[..];
        assert_eq!(
            receive_blocking(&mut from).unwrap(),
            Some((Kind::Done, Bytes::from_static(&[1, 2, 3, 4])))
        );
        assert_eq!(receive_blocking(&mut from).unwrap(), None);
        assert!(receive_blocking(&mut &[b'?'; 9][..]).is_err());
    }
}
