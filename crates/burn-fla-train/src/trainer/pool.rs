//! Threads that live as long as the run, for the data-parallel CPU backend.

use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

/// A fixed number of workers, the calling thread being the first. With one worker everything runs on the calling
/// thread, as a GPU wants it: each thread would be a stream of its own.
#[derive(Debug)]
pub(super) struct Pool {
    workers: Vec<Worker>,
}

#[derive(Debug)]
struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn new(threads: usize) -> Pool {
        let workers = (1..threads.max(1)).map(|index| {
            let (sender, jobs): (Sender<Job>, Receiver<Job>) = channel();
            let work = move || {
                for job in jobs {
                    job();
                }
            };
            let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(work);
            // A thread that cannot be started gets its jobs run by the calling thread.
            Worker { jobs: thread.is_ok().then_some(sender), thread: thread.ok() }
        });
        Pool { workers: workers.collect() }
    }

    /// How many run at once.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `jobs[i]` on worker i and returns the results in order. There may be fewer jobs than workers, not more.
    pub(super) fn run<R: Send + 'static>(&self, jobs: Vec<Box<dyn FnOnce() -> R + Send>>) -> Vec<R> {
        assert!(jobs.len() <= self.threads(), "{} jobs for {} workers", jobs.len(), self.threads());
        let mut jobs = jobs.into_iter();
        let Some(own) = jobs.next() else { return Vec::new() };
        let mut waiting = Vec::new();
        for (worker, job) in self.workers.iter().zip(jobs) {
            let (done, result) = channel();
            let task: Job = Box::new(move || {
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
                // The receiver is gone only if the calling thread is unwinding already.
                let _ = done.send(outcome);
            });
            match &worker.jobs {
                Some(jobs) => {
                    if let Err(refused) = jobs.send(task) {
                        (refused.0)();
                    }
                }
                None => task(),
            }
            waiting.push(result);
        }
        let mut results = vec![own()];
        for result in waiting {
            match result.recv() {
                Ok(Ok(value)) => results.push(value),
                Ok(Err(panic)) => resume_unwind(panic),
                Err(_) => unreachable!("a worker answers every job"),
            }
        }
        results
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.jobs = None;
            if let Some(thread) = worker.thread.take() {
                // Jobs catch their panics, so there is none to pass on.
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_panics_pass() {
        let pool = Pool::new(3);
        for count in 0..=3usize {
            let jobs: Vec<Box<dyn FnOnce() -> usize + Send>> =
                (0..count).map(|i| Box::new(move || i * 10) as _).collect();
            assert_eq!(pool.run(jobs), (0..count).map(|i| i * 10).collect::<Vec<_>>());
        }
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run::<()>(vec![Box::new(|| ()), Box::new(|| panic!("inside"))])
        }));
        assert!(failed.is_err());
        assert_eq!(pool.run::<i32>(vec![Box::new(|| 1), Box::new(|| 2)]), [1, 2]);
    }
}
