//! Parquet files: the strings of one column.

use std::cell::Cell;
use std::fs::File;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::basic::Type;
use parquet::column::reader::ColumnReader;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::documents::{Document, Repairs, utf8};
use crate::TrainError;

/// Rows that are decoded at once.
const BATCH: usize = 256;

thread_local! {
    static READING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is in the reader of Parquet files. It panics at some damaged files, which becomes the message of an
/// error; a program's own panic hook may keep silent about it.
pub fn is_reading_parquet() -> bool {
    READING.get()
}

/// Runs a part of the reader; a panic in it becomes an error.
fn read<T>(f: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    READING.set(true);
    // What the reader holds is dropped after a panic, and never looked at again.
    let outcome = catch_unwind(AssertUnwindSafe(f));
    READING.set(false);
    match outcome {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
            (Some(text), _) => text.clone(),
            (None, Some(text)) => (*text).to_string(),
            (None, None) => "it is damaged".to_string(),
        }),
    }
}

pub(super) fn documents(
    path: &Path,
    column: &str,
    repairs: &mut Repairs,
    each: &mut dyn FnMut(Document) -> Result<ControlFlow<()>, TrainError>,
) -> Result<ControlFlow<()>, TrainError> {
    let bad = |message: String| TrainError::BadDocument { path: path.to_path_buf(), line: None, message };
    let damaged = |error: String| {
        let line = error.split_whitespace().collect::<Vec<_>>().join(" ");
        bad(format!("cannot be read as Parquet: {line}"))
    };
    let file = File::open(path).map_err(TrainError::io("open", path))?;
    let reader = read(|| SerializedFileReader::new(file)).map_err(damaged)?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let columns = schema.columns();
    let Some(index) = columns.iter().position(|found| found.path().string() == column) else {
        let names: Vec<String> = columns.iter().map(|found| found.path().string()).collect();
        return Err(bad(format!(
            "there is no column {column:?}; set the source's column to one of {}",
            names.join(", ")
        )));
    };
    let chosen = &columns[index];
    if chosen.physical_type() != Type::BYTE_ARRAY || chosen.max_rep_level() > 0 {
        let kind =
            if chosen.max_rep_level() > 0 { "a list".to_string() } else { format!("{:?}", chosen.physical_type()) };
        return Err(bad(format!("the column {column:?} is {kind}, not text")));
    }
    for group in 0..reader.num_row_groups() {
        let group = read(|| reader.get_row_group(group)).map_err(damaged)?;
        let ColumnReader::ByteArrayColumnReader(mut values) =
            read(|| group.get_column_reader(index)).map_err(damaged)?
        else {
            return Err(bad(format!("the column {column:?} is not text")));
        };
        loop {
            let (mut levels, mut texts) = (Vec::new(), Vec::new());
            // Rows without a value have a level and no text: they are left out.
            let (rows, _, _) =
                read(|| values.read_records(BATCH, Some(&mut levels), None, &mut texts)).map_err(damaged)?;
            if rows == 0 {
                break;
            }
            for text in texts {
                if each(Document::Text(utf8(text.data().to_vec(), repairs)))?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}
