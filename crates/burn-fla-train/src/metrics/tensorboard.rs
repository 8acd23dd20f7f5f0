//! The figures of a run as TensorBoard reads them.
//!
//! An event file is a sequence of records: length (u64), checksum of the length, a message, checksum of the message. The
//! message is a protocol buffer `Event { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary =
//! 5 }` with `Summary { repeated Value value = 1 }` and `Value { string tag = 1; float simple_value = 2 }`. These dozen
//! fields are written here: the crates that write them bring a compiler of protocol buffers along.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::Line;
use crate::TrainError;

/// Writes `events.out.tfevents.…` into a folder.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: File,
}

impl TensorBoard {
    /// Begins a file in `folder` for a run that continues after `step`. TensorBoard joins the files of a folder; of the
    /// steps that a resumed run makes again it takes the later.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn create(folder: &Path, step: u64) -> Result<TensorBoard, TrainError> {
        std::fs::create_dir_all(folder).map_err(TrainError::io("create the folder", folder))?;
        let now = seconds();
        let path = folder.join(format!("events.out.tfevents.{:.0}.{step:08}.burn-fla", now * 1e6));
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let mut board = TensorBoard { file: file.map_err(TrainError::io("create", &path))?, path };
        let mut event = Vec::new();
        double(&mut event, 1, now);
        bytes(&mut event, 3, b"brain.Event:2");
        board.record(&event)?;
        Ok(board)
    }

    /// Appends the numbers of a line; a sample has none.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&mut self, line: &Line) -> Result<(), TrainError> {
        let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(line) else { return Ok(()) };
        let Some(step) = fields.get("step").and_then(serde_json::Value::as_u64) else { return Ok(()) };
        let group = if fields.contains_key("validation_loss") { "validation" } else { "train" };
        let mut summary = Vec::new();
        for (name, value) in fields.iter().filter(|(name, _)| *name != "step") {
            let Some(number) = value.as_f64() else { continue };
            let mut entry = Vec::new();
            let name = name.strip_prefix("validation_").unwrap_or(name);
            bytes(&mut entry, 1, format!("{group}/{name}").as_bytes());
            key(&mut entry, 2, 5);
            entry.extend((number as f32).to_le_bytes());
            bytes(&mut summary, 1, &entry);
        }
        if summary.is_empty() {
            return Ok(());
        }
        let mut event = Vec::new();
        double(&mut event, 1, seconds());
        key(&mut event, 2, 0);
        varint(&mut event, step);
        bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    fn record(&mut self, message: &[u8]) -> Result<(), TrainError> {
        let length = (message.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked(&length).to_le_bytes());
        record.extend(message);
        record.extend(masked(message).to_le_bytes());
        self.file.write_all(&record).map_err(TrainError::io("write", &self.path))
    }
}

/// The checksum of the format: CRC-32C, turned and shifted, so that the checksum of a checksum is none.
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn key(out: &mut Vec<u8>, field: u64, kind: u64) {
    varint(out, field << 3 | kind);
}

fn bytes(out: &mut Vec<u8>, field: u64, content: &[u8]) {
    key(out, field, 2);
    varint(out, content.len() as u64);
    out.extend(content);
}

fn double(out: &mut Vec<u8>, field: u64, value: f64) {
    key(out, field, 1);
    out.extend(value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::ValidationLine;

    /// The bytes of a record from the format's description, with the checksums that TensorFlow documents for known input.
    #[test]
    fn records_are_those_of_the_format() {
        // RFC 3720, B.4: CRC-32C of 32 zeros.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked(&[0; 32]), 0x8a91_36aau32.rotate_right(15).wrapping_add(0xa282_ead8));
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path(), 3).unwrap();
        let line = ValidationLine {
            step: 300,
            tokens: 7,
            validation_loss: 1.5,
            validation_bits_per_byte: Some(2.25),
            validation_accuracy: None,
            seconds: 4.0,
        };
        board.write(&Line::Validation(line)).unwrap();
        let all = std::fs::read(&board.path).unwrap();
        let mut rest = &all[..];
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked(&rest[..8]).to_le_bytes());
            messages.push(&rest[12..12 + length]);
            assert_eq!(rest[12 + length..16 + length], masked(messages.last().unwrap()).to_le_bytes());
            rest = &rest[16 + length..];
        }
        let [first, second] = messages[..] else { panic!("{} records", messages.len()) };
        assert!(first.ends_with(b"\x1a\x0dbrain.Event:2"));
        // After the time (9 bytes): step 300 is the varint ac 02; then the values, tag and float each.
        assert_eq!(second[9..12], [0x10, 0xac, 0x02]);
        let value = |tag: &str, number: f32| {
            let mut entry = vec![0x0a, tag.len() as u8];
            entry.extend(tag.bytes());
            entry.push(0x15);
            entry.extend(number.to_le_bytes());
            [vec![0x0a, entry.len() as u8], entry].concat()
        };
        let values = [
            value("validation/tokens", 7.0),
            value("validation/loss", 1.5),
            value("validation/bits_per_byte", 2.25),
            value("validation/seconds", 4.0),
        ]
        .concat();
        assert_eq!(second[12..], [vec![0x2a, values.len() as u8], values].concat());
    }
}
