use rustbpe::*;
use std::time::Instant;
fn main() {
    let text = std::fs::read_to_string("/tmp/hA/all.txt").unwrap();
    let sp = split::Splitter::new(split::DEFAULT_PATTERN).unwrap();
    for _ in 0..3 {
        let t = Instant::now();
        let mut n = 0usize; let mut h = 0usize;
        sp.for_each(&text, |s, e| { n += 1; h ^= e - s; }).unwrap();
        println!("split {:?} n {n} {h}", t.elapsed());
        let t = Instant::now();
        let mut hh = 0u64;
        sp.for_each(&text, |s, e| { if e - s < 16 { hh ^= key::hash_key(key::key(text.as_bytes(), s, e)); } }).unwrap();
        println!("split+hash {:?} {hh}", t.elapsed());
        let t = Instant::now();
        let mut c = count::PieceCounter::new();
        sp.for_each(&text, |s, e| c.add(text.as_bytes(), s, e)).unwrap();
        c.flush();
        println!("count {:?} uniq {}", t.elapsed(), c.len());
        let t = Instant::now();
        let w = words::Words::new(c).unwrap();
        println!("words {:?}", t.elapsed());
        let t = Instant::now();
        let mut tr = train::Trainer::new(w, 32768 - 256);
        println!("trainer {:?}", t.elapsed());
        let t = Instant::now();
        tr.run(32768 - 256, Instant::now() + std::time::Duration::from_secs(1000));
        println!("merge {:?}", t.elapsed());
        let merges = tr.into_merges();
        let mut ranks: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b]).collect();
        for (a, b) in merges { let t = [&ranks[a as usize][..], &ranks[b as usize][..]].concat(); ranks.push(t); }
        let v = vocab::Vocab::new(ranks.iter().enumerate().map(|(i, r)| (&r[..], i as u32)).collect(), true).unwrap();
        let mut worker = encode::Worker::new(sp.clone());
        for _ in 0..3 {
            let t = Instant::now();
            let mut out: Vec<u16> = Vec::with_capacity(text.len() / 4);
            for d in text.split("\n\n") { worker.encode(&v, d, &mut out).unwrap(); }
            println!("encode {:?} {}", t.elapsed(), out.len());
        }
    }
}
