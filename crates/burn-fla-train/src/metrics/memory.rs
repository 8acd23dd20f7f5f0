//! How much memory a run takes: of the device, where its allocator tells, and of the process, where the system does.

use burn::tensor::Device;
use serde::Serialize;

/// Memory at one moment, in GiB; what is not known is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Memory {
    /// In use on the device. Between two steps that is what stays: parameters, moments, caches of constants.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_use_gib: Option<f64>,
    /// Reserved on the device by the allocator, which gives little back: near the most that was ever in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserved_gib: Option<f64>,
    /// Resident memory of the process now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_gib: Option<f64>,
    /// The most resident memory that the process has had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_gib: Option<f64>,
}

impl Memory {
    /// That of `device`, which has no work under way, and of this process.
    pub fn now(device: &Device) -> Memory {
        let pool = device.clone().inner().memory_pool_usage();
        let process = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let (rss, peak) = (field(&process, "VmRSS:"), field(&process, "VmHWM:"));
        Memory {
            in_use_gib: pool.as_ref().map(|pool| gibibytes(pool.bytes_in_use)),
            reserved_gib: pool.as_ref().map(|pool| gibibytes(pool.bytes_reserved)),
            rss_gib: rss.map(gibibytes),
            // The system keeps the two by different counters, of which each may lag by some pages.
            peak_rss_gib: peak.max(rss).map(gibibytes),
        }
    }

    /// What has to fit: on a device with an allocator of its own what that has reserved, else the peak of the process.
    pub fn most(&self) -> Option<f64> {
        self.reserved_gib.or(self.peak_rss_gib)
    }
}

/// Bytes of memory that this process could still take without swapping; `None` where the system does not tell. A limit of
/// the container's is respected where it is the smaller.
pub(crate) fn available() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let system = field(&read("/proc/meminfo")?, "MemAvailable:")?;
    // Version 2 of control groups, seen from inside a container; elsewhere there are no such files, or no limit.
    let group = |name: &str| read(&format!("/sys/fs/cgroup/memory.{name}"));
    let left = || left_in_group(&group("max")?, &group("current")?, &group("stat")?);
    Some(left().map_or(system, |left| system.min(left)))
}

/// What is left of a group's limit. Pages that only cache files are counted as its own, and are given up when asked for.
fn left_in_group(most: &str, now: &str, stat: &str) -> Option<u64> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let counter = |name: &str| number(stat.lines().find_map(|line| line.strip_prefix(name))?);
    let caches = counter("inactive_file ")? + counter("active_file ")?;
    Some(number(most)?.saturating_sub(number(now)?.saturating_sub(caches)))
}

/// A line `name   123 kB`, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| 1024 * kib)
}

/// Bytes in GiB, to the thousandth.
pub(crate) fn gibibytes(bytes: u64) -> f64 {
    (bytes as f64 / f64::from(1 << 30) * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_bytes() {
        let text = "VmPeak:\t 99 kB\nVmHWM:\t    2048 kB\nVmRSS:\t     512 kB\n";
        assert_eq!(field(text, "VmHWM:"), Some(2 << 20));
        assert_eq!(field(text, "VmRSS:"), Some(512 << 10));
        assert_eq!(field(text, "VmSwap:"), None);
    }

    #[test]
    fn what_caches_files_counts_as_left() {
        let stat = "anon 300\nfile 500\ninactive_file 400\nactive_file 50\n";
        assert_eq!(left_in_group("1000\n", "800\n", stat), Some(650));
        assert_eq!(left_in_group("max\n", "800\n", stat), None);
        assert_eq!(left_in_group("100\n", "800\n", "inactive_file 0\nactive_file 0\n"), Some(0));
    }

    /// In a process of its own: other tests take and give back memory at the same time.
    #[cfg(all(target_os = "linux", feature = "flex"))]
    #[test]
    fn what_is_taken_is_seen() {
        const ALONE: &str = "BURN_FLA_TEST_ALONE";
        if std::env::var_os(ALONE).is_none() {
            let alone = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "metrics::memory::tests::what_is_taken_is_seen"])
                .env(ALONE, "1")
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&alone.stdout).into_owned();
            assert!(alone.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let device = Device::flex();
        let before = Memory::now(&device);
        let taken = std::hint::black_box(vec![1u8; 64 << 20]);
        let with = Memory::now(&device);
        drop(taken);
        let grown = with.rss_gib.unwrap() - before.rss_gib.unwrap();
        assert!((0.06..0.07).contains(&grown), "{grown} GiB for 1/16");
        // The peak stays when the memory is given back.
        let after = Memory::now(&device);
        assert!(after.rss_gib.unwrap() < with.rss_gib.unwrap() - 0.05, "{after:?}");
        assert!(after.most().unwrap() > with.rss_gib.unwrap() - 0.003, "{after:?}");
        assert!(available().unwrap() > 64 << 20);
    }
}
