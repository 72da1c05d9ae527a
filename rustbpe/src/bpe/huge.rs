//! Large tables that are read at random places, in large pages.

/// Smaller tables than this fit the processor's page tables anyway.
#[cfg(target_os = "linux")]
const WORTHWHILE_BYTES: usize = 4 << 20;

/// An empty vector with room for `capacity` items, whose memory the system is asked to give in large pages (on Linux; where
/// it declines, nothing is lost but speed). Random access to tens of megabytes in small pages spends much of its time on
/// translating addresses, above all in virtual machines.
pub fn with_capacity<T>(capacity: usize) -> Vec<T> {
    let items = Vec::with_capacity(capacity);
    #[cfg(target_os = "linux")]
    {
        let bytes = capacity * size_of::<T>();
        if bytes >= WORTHWHILE_BYTES {
            // The advice is about whole pages: leave out the parts of pages at both ends.
            const PAGE: usize = 1 << 16;
            let start = items.as_ptr() as usize;
            let (first, end) = (start.next_multiple_of(PAGE), (start + bytes) / PAGE * PAGE);
            // SAFETY: the range lies inside the vector's allocation, and this advice does not change its contents.
            unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
        }
    }
    items
}

/// `count` copies of `item`, likewise.
pub fn filled<T: Clone>(item: T, count: usize) -> Vec<T> {
    let mut items = with_capacity(count);
    items.resize(count, item);
    items
}
