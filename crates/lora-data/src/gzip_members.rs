//! Decompresses gzip files of several members (RFC 1952).

use std::io::{self, BufRead, Read};

use flate2::bufread::GzDecoder;

/// The contents of all members of a gzip file. Zeros may follow each member, such as those that
/// fill a block of a tape.
pub(crate) struct GzipMembers<R> {
    /// The member that is read; `None` at the end of the file.
    member: Option<GzDecoder<R>>,
}

impl<R: BufRead> GzipMembers<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self { member: Some(GzDecoder::new(reader)) }
    }
}

impl<R: BufRead> Read for GzipMembers<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let read = member.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            let rest = self.member.take().map(GzDecoder::into_inner);
            self.member = rest.map(after_padding).transpose()?.flatten().map(GzDecoder::new);
        }
        Ok(0)
    }
}

/// Skips zeros. `None` at the end of the file.
fn after_padding<R: BufRead>(mut reader: R) -> io::Result<Option<R>> {
    loop {
        let bytes = reader.fill_buf()?;
        let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
        let (is_end, is_padding) = (bytes.is_empty(), zeros == bytes.len());
        reader.consume(zeros);
        match (is_end, is_padding) {
            (true, _) => return Ok(None),
            (false, true) => {}
            (false, false) => return Ok(Some(reader)),
        }
    }
}
