//! Files that are there as a whole or not at all.

use std::io::Write;
use std::path::Path;

use crate::NnError;

/// Writes `path` as a whole: what `fill` writes goes into a file of another name in the same folder, which is synced
/// and renamed. When anything fails the old content stays and the new file is removed.
pub(crate) fn write_with(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<(), NnError>) -> Result<(), NnError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let failed = || NnError::io("write", path);
    let temporary = tempfile::Builder::new().prefix(".partial-").tempfile_in(folder).map_err(failed())?;
    let mut writer = std::io::BufWriter::with_capacity(1 << 20, temporary);
    fill(&mut writer)?;
    let temporary = writer.into_inner().map_err(|error| failed()(error.into_error()))?;
    temporary.as_file().sync_all().map_err(failed())?;
    share_mode(temporary.as_file()).map_err(failed())?;
    temporary.persist(path).map_err(|error| failed()(error.error))?;
    sync_folder(folder).map_err(failed())
}

/// Writes `content` into `path` as a whole or not at all.
///
/// # Errors
/// [`NnError::Io`] when the file cannot be written.
pub fn write_file(path: impl AsRef<Path>, content: &[u8]) -> Result<(), NnError> {
    let path = path.as_ref();
    write_with(path, |file| file.write_all(content).map_err(NnError::io("write", path)))
}

/// Temporary files are private; what takes their place is a file like any other.
#[cfg(unix)]
fn share_mode(file: &std::fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn share_mode(_: &std::fs::File) -> std::io::Result<()> {
    Ok(())
}

/// A rename lasts only when the folder is synced too.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    std::fs::File::open(folder)?.sync_all()
}

#[cfg(not(unix))]
fn sync_folder(_: &Path) -> std::io::Result<()> {
    Ok(())
}
