//! Work in numbered parts that several threads take one after the other.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What a custom call computes, together with whatever threads come to help.
pub trait Job: Send + Sync + 'static {
    /// How many threads find something to do.
    fn threads(&self) -> usize;
    /// Does parts until none is left to take. May be called late: then there is nothing left.
    fn work(&self);
    /// Waits for the parts that other threads have taken. Call it after `work`.
    fn wait(&self);
}

/// The numbers from 0 up, each given out once, and how many of them are done.
pub struct Parts {
    total: usize,
    next: AtomicUsize,
    done: AtomicUsize,
}

impl Parts {
    pub fn new(total: usize) -> Parts {
        Parts { total, next: AtomicUsize::new(0), done: AtomicUsize::new(0) }
    }

    pub fn work(&self, mut part: impl FnMut(usize)) {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.total {
                return;
            }
            part(number);
            self.done.fetch_add(1, Ordering::Release);
        }
    }

    pub fn wait(&self) {
        let mut spins = 0;
        while self.done.load(Ordering::Acquire) < self.total {
            spins += 1;
            if spins < 2000 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now(); // the other thread has lost its core
            }
        }
    }
}
